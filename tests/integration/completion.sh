#!/usr/bin/env bash
# The shell completion of eepctl knows every command, every option that argp lists (--usage, which it does not read), every
# verb, and the values of -o.  And every command's help has examples.
#
#   tests/integration/completion.sh build
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(cd "$1" && pwd)
PATH=$bin:$PATH
failures=0
fail() { echo "completion: $*"; failures=$((failures + 1)); }

source coordinator/eepctl/completion/eepctl.bash

completes() { # WORDS... CURRENT: what is offered, one a line
    COMP_WORDS=("$@")
    COMP_CWORD=$(($# - 1))
    _eepctl
    printf '%s\n' ${COMPREPLY[@]+"${COMPREPLY[@]}"}
}
offers() { # WANTED, then the words
    local wanted=$1
    shift
    completes "$@" >/dev/null
    local word
    for word in ${COMPREPLY[@]+"${COMPREPLY[@]}"}; do [ "$word" = "$wanted" ] && return; done
    fail "'$*' does not offer '$wanted'"
}

# The table of commands, from the source.
mapfile -t commands < <(sed -n 's/^    {"\([a-z][a-z-]*\)", cmd_.*/\1/p' coordinator/eepctl/main.c)
[ ${#commands[@]} -ge 12 ] || fail "only ${#commands[@]} commands are in main.c"
options=0
for command in "${commands[@]}"; do
    offers "$command" eepctl ""
    offers "$command" eepctl -o json "${command:0:1}"
    help=$(eepctl "$command" -h) || fail "eepctl $command -h: exit status $?"
    grep -qE '^Examples?:' <<<"$help" || fail "eepctl $command -h has no examples"
    grep -q "^  eepctl $command" <<<"$help" || fail "the examples of eepctl $command are of another command"
    for option in $(eepctl "$command" --usage | grep -oE -e '--[a-z][a-z0-9-]+' | sort -u); do
        [ "$option" = --usage ] && continue
        options=$((options + 1))
        offers "$option" eepctl "$command" "${option:0:4}"
    done
done
[ "$options" -ge 60 ] || fail "only $options options were looked at"
for verb in get put add cas del list watch queue stat; do offers "$verb" eepctl kv ""; done
for verb in push pop len; do offers "$verb" eepctl kv queue ""; done
offers list eepctl barrier l
offers inspect eepctl model ""
offers json eepctl status -o ""
offers json eepctl status --output = j
offers eplb eepctl plan --policy ""
[ -z "$(completes eepctl scale --nonsense)" ] || fail "an option is offered that is none"
[ -z "$(completes eepctl kv queue push x)" ] || fail "a value is offered where nobody can know one"

# zsh's file: as far as there is a zsh
if command -v zsh >/dev/null; then
    zsh -n coordinator/eepctl/completion/_eepctl || fail "zsh cannot read _eepctl"
fi
[ "$failures" = 0 ] || exit 1
echo "${#commands[@]} commands, $options options passed"
