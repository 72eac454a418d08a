#!/bin/sh
# Manual pages: programs from their own --help (help2man), configuration files from those that are shipped.
#
#   systemd/man.sh BUILD VERSION         writes BUILD/man
set -eu
build=$1 version=$2 out=$1/man
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}" LC_ALL=C.UTF-8
rm -rf "$out" && mkdir -p "$out"

page() { # section, program, what it is, file of sections to add
    help2man -N -s "$1" -n "$3" -S eep --version-string="$version" ${4:+-i "$4"} -o "$out/$2.$1" "${5:-$build/$2}"
}
also=$out/also
printf '[see also]\n.BR eepctl (1),\n.BR eep\\-coordinator (8),\n.BR eep\\-agent (8),\n.BR eep.conf (5)\n' >"$also"
page 8 eep-coordinator "coordinates the topology of an expert-parallel cluster" "$also"
page 8 eep-agent "owns the weights of one rank of an expert-parallel cluster" "$also"
page 8 eep-keeper "holds an agent's descriptors where no systemd runs" "$also"

# eepctl: each command's own help is a section
{
    "$build/eepctl" -h | sed -n 's/^  \([a-z][a-z-]*\)  *[a-z].*/\1/p' | while read -r command; do
        "$build/eepctl" "$command" -h >"$out/help" 2>/dev/null || continue
        printf '[eepctl %s]\n.nf\n' "$command"
        # argp wraps by itself; a line that begins with a dot is text
        sed -e 's/\\/\\e/g' -e 's/-/\\-/g' -e "s/^[.']/\\\\\&&/" "$out/help"
        printf '.fi\n\n'
    done
    cat "$also"
} >"$out/commands"
page 1 eepctl "looks at and changes the topology of an expert-parallel cluster" "$out/commands"
rm -f "$out/help" "$out/commands" "$also"

day=$(date -u -d "@$SOURCE_DATE_EPOCH" '+%B %Y')
escape() { sed -e 's/\\/\\e/g' -e 's/-/\\-/g' -e "s/^[.']/\\\\\&&/"; }
{
    printf '.TH EEP\\-CA 1 "%s" "%s" "eep"\n.SH NAME\neep\\-ca \\- a small CA for the certificates of one cluster\n' "$day" "$version"
    printf '.SH DESCRIPTION\n.nf\n'
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' systemd/eep-ca | escape
    printf '.fi\n.SH SEE ALSO\n.BR eepctl (1),\n.BR openssl (1)\n'
} >"$out/eep-ca.1"
{
    printf '.TH EEP.CONF 5 "%s" "%s" "eep"\n.SH NAME\neep.conf \\- configuration files of the eep daemons\n' "$day" "$version"
    printf '.SH DESCRIPTION\n.I /etc/eep/coordinator.conf\nis of\n.BR eep\\-coordinator (8),\n'
    printf '.I /etc/eep/agent.conf\nand\n.I /etc/eep/agent\\-NAME.conf\nare of\n.BR eep\\-agent (8).\n'
    printf 'Every option has the name that it has on the command line.\n'
    printf 'What is said later replaces what was said before: files in the order of their\n.BR \\-\\-config ,\nthe command line last.\n'
    printf 'A name that is unknown is a mistake.\nBoth files follow, with every option and its default.\n'
    for file in coordinator agent; do
        printf '.SH %s.CONF\n.nf\n' "$(echo $file | tr a-z A-Z)"
        escape <systemd/config/$file.conf
        printf '.fi\n'
    done
    printf '.SH SEE ALSO\n.BR eep\\-coordinator (8),\n.BR eep\\-agent (8)\n'
} >"$out/eep.conf.5"
