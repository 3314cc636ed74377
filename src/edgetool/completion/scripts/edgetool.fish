# fish completion for edgetool; save it as edgetool.fish in ~/.config/fish/completions/

function __edgetool_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set current (string unescape -- $current; or string replace -r '^["\']' '' -- $current) # or in open quotes
    set -l program (command -s -- $words[1]; or command -s edgetool)
    set -e words[1]
    set -l reply ($program _complete fish -- $words $current 2>/dev/null </dev/null)
    if test (count $reply) -eq 0
        __fish_complete_path $current # edgetool could not be asked: files, as without this script
        return
    end
    set -l said (string split ' ' -- $reply[1])
    printf '%s\n' $reply[2..]
    set -l before (string match -r -- '^--[^=]+=' $current)
    set -l path (string replace -- "$before" '' $current)
    switch $said[1]
        case command
            complete -C (string join ' ' -- (string escape -- $words[$said[3]..]) $current)
        case directories
            printf "$before%s\n" (__fish_complete_directories $path)
        case files
            printf "$before%s\n" (__fish_complete_path $path)
        case 'files:*'
            set -l suffixes (string replace -a ',' '|' (string replace 'files:' '' $said[1]))
            printf "$before%s\n" (__fish_complete_path $path | string match -r -- ".*(?:/|\.(?:$suffixes))(?:\t.*)?\$")
    end
end

complete -c edgetool -f -a '(__edgetool_complete)'
