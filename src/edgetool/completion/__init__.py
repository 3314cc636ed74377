"""What shells offer at the Tab key: `words` finds what is being typed, `offers` and `sources` know what could follow.

The scripts that shells read (`scripts/`) send the words typed so far to `edgetool _complete`, and
`replies` puts its answer in the form that each of them understands.
"""
