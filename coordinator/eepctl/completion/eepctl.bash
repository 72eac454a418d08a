# Completion of eepctl for bash; the function for zsh asks it, too.  It reads eepctl's own help, so that it knows every command,
# verb and option of the version that is installed.

# The candidates for what comes after these words (the first is the program): one a line.
_eepctl_candidates() {
    local program=$1 previous='' command='' word help usage
    local -a arguments=()
    shift
    for word; do
        case $previous in
        -c | -o | --coordinator | --output) previous= ;; # its value, not an argument
        *)
            previous=$word
            case $word in
            -*) ;;
            *) if [ -z "$command" ]; then command=$word; else arguments+=("$word"); fi ;;
            esac
            ;;
        esac
    done
    case ${previous%=} in
    -o | --output) printf '%s\n' table json && return ;;
    --policy) printf '%s\n' elastic eplb && return ;;
    --remove) _eepctl_agents "$program" && return ;;
    -c | --coordinator | --input) return ;; # files, which the shell knows
    esac
    help=$("$program" ${command:+"$command"} -h 2>/dev/null) || return
    printf '%s\n' "$help" | sed -nE 's/^ +(-., )?(--[a-z0-9-]+)(=|\[=|  |$).*/\2/p; s/^ +(-[a-z]), .*/\1/p'
    if [ -z "$command" ]; then
        printf '%s\n' "$help" | sed -n '/^Commands:/,/^$/s/^  \([a-z][a-z-]*\) .*/\1/p'
        return
    fi
    # "Usage: eepctl kv [OPTION...] queue push QUEUE VALUE", "  or:  ...": words in small letters are verbs
    printf '%s\n' "$help" | sed -nE 's/^(Usage:|  or: ) +eepctl [a-z]+ \[OPTION\.\.\.\] ?//p' | while read -r -a usage; do
        local i=0
        for word in ${arguments[@]+"${arguments[@]}"}; do
            case ${usage[i]-} in
            [a-z]*) [ "$word" = "${usage[i]}" ] || continue 2 ;;
            esac
            i=$((i + 1))
        done
        case ${usage[i]-} in
        [a-z]*) printf '%s\n' "${usage[i]}" ;;
        AGENT) _eepctl_agents "$program" ;;
        esac
    done
}

_eepctl_agents() {
    timeout 1 "$1" agents 2>/dev/null | sed -n '2,$s/ .*//p'
}

_eepctl() {
    local current=${COMP_WORDS[COMP_CWORD]}
    local -a before=("${COMP_WORDS[@]:0:COMP_CWORD}")
    if [ "$current" = = ]; then # bash splits --option=value at the sign
        current=
    elif [ "$COMP_CWORD" -gt 1 ] && [ "${COMP_WORDS[COMP_CWORD - 1]}" = = ]; then
        before=("${COMP_WORDS[@]:0:COMP_CWORD-1}")
    fi
    COMPREPLY=()
    local word
    while IFS= read -r word; do
        case $word in "$current"*) COMPREPLY+=("$word") ;; esac
    done < <(_eepctl_candidates "${before[@]}" | sort -u)
}

complete -o default -F _eepctl eepctl 2>/dev/null || : # a shell without completion only asks for candidates
