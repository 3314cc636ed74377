# bash completion for edgetool; source it, or save it as edgetool in
# ${XDG_DATA_HOME:-~/.local/share}/bash-completion/completions/
# shellcheck shell=bash

_edgetool() {
    local program=$1 paths space count suffix reply=() found=()
    # shellcheck disable=SC2088 # as typed: bash has not expanded it yet
    [[ $program == '~/'* ]] && program=$HOME/${program#'~/'}
    type -P "$program" >/dev/null || program=edgetool
    mapfile -t reply < <("$program" _complete bash -- "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null </dev/null)
    COMPREPLY=()
    if ((${#reply[@]} == 0)); then
        compopt -o default # edgetool could not be asked: files, as without this script
        return
    fi
    read -r paths space count <<<"${reply[0]}"
    reply=("${reply[@]:1}")
    case $paths in
        command)
            # its name, then files: bash has no way to ask for what it knows of another command
            if ((COMP_CWORD <= count)); then
                mapfile -t COMPREPLY < <(compgen -A command -- "$2")
            else
                compopt -o default
            fi
            return
            ;;
        directories) mapfile -t found < <(compgen -d -- "$2") ;;
        files)
            if ((${#reply[@]} == 0)); then
                compopt -o default # bash itself knows best how to complete what is in quotes
                return
            fi
            mapfile -t found < <(compgen -f -- "$2")
            ;;
        files:*)
            paths=${paths#files:}
            mapfile -t found < <(compgen -d -- "$2")
            for suffix in ${paths//,/ }; do
                mapfile -t -O "${#found[@]}" found < <(compgen -f -X "!*.$suffix" -- "$2")
            done
            ;;
    esac
    COMPREPLY=("${reply[@]}" "${found[@]}")
    ((${#found[@]})) && compopt -o filenames # bash quotes them, and puts a slash after directories
    [[ $space == nospace && ${#found[@]} == 0 ]] && compopt -o nospace
    return 0
}

complete -F _edgetool edgetool
