#compdef edgetool
# zsh completion for edgetool; source it after compinit, or save it as _edgetool in a directory of $fpath

_edgetool() {
  local program=${(Q)words[1]} paths space count
  local -a reply
  [[ $program == '~/'* ]] && program=$HOME/${program#'~/'}
  (( $+commands[$program] )) || [[ -x $program ]] || program=edgetool
  reply=("${(@f)$($program _complete zsh -- "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null </dev/null)}")
  if [[ -z $reply[1] ]]; then
    _files # edgetool could not be asked: files, as without this script
    return
  fi
  read -r paths space count <<<"$reply[1]"
  if [[ $paths == command ]]; then
    (( CURRENT -= count ))
    shift $count words
    _normal
    return
  fi
  (( count )) && compset -p $count
  local -a offered=("${(@)reply[2,-1]}")
  local found=1
  if (( $#offered )) && [[ -n $offered[1] ]]; then
    if [[ $space == nospace ]]; then
      _describe -V value offered -S '' && found=0
    else
      _describe -V value offered && found=0
    fi
  fi
  case $paths in
    directories) _files -/ && found=0 ;;
    files) _files && found=0 ;;
    files:*)
      # not _files: where nothing has the suffix, it would offer all other files
      _path_files -/ && found=0
      _path_files -g "*.${${paths#files:}//,/ *.}" && found=0
      ;;
  esac
  return found
}

if [[ $funcstack[1] == _edgetool ]]; then
  _edgetool "$@" # loaded from $fpath at its first use
else
  compdef _edgetool edgetool
fi
