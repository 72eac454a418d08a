#!/bin/sh
# Every ELF program and library in a folder asks for nothing that an older system lacks: no symbol version of glibc above
# the ceiling, and no shared library but libc's own.  Says each offending file with the symbol or library.
#
#   tests/bundle/elf.sh FOLDER [CEILING]      (default 2.34)
set -eu

folder=$1 ceiling=${2:-2.34}
bad=$(mktemp) && trap 'rm -f "$bad"' EXIT
files=0
for file in $(find "$folder" -type f | sort); do
    [ "$(head -c 4 "$file" | tr -d '\0')" = "$(printf '\177ELF')" ] || continue
    files=$((files + 1))
    # of -T the version is the last field but one, in -p's list of required versions it is the last
    objdump -Tp "$file" | awk -v file="$file" -v ceiling="$ceiling" '
        $NF ~ /^GLIBC_/                              { version = $NF; symbol = "the file" }
        NF > 1 && $(NF - 1) ~ /^\(?GLIBC_[^ ]*\)?$/     { version = $(NF - 1); symbol = $NF }
        version != "" {
            gsub(/[()]/, "", version)
            split(substr(version, 7), have, "."); split(ceiling, most, ".")
            if (have[1] !~ /^[0-9]+$/ || have[1] + 0 > most[1] + 0 || (have[1] == most[1] && have[2] + 0 > most[2] + 0))
                print file ": " symbol " needs " version ", which is above GLIBC_" ceiling
            version = ""
        }
        $1 == "NEEDED" && $2 !~ /^(libc\.so\.6|libm\.so\.6|libdl\.so\.2|libpthread\.so\.0|librt\.so\.1|ld-linux-x86-64\.so\.2)$/ {
            print file ": needs the shared library " $2
        }
        $1 == "RPATH" || $1 == "RUNPATH"             { print file ": has a library path of its own, " $2 }' >>"$bad"
done
if [ "$files" = 0 ]; then
    echo "$folder: no ELF file in it" >&2
    exit 1
elif [ -s "$bad" ]; then
    cat "$bad" >&2
    exit 1
fi
echo "$files ELF files: nothing above GLIBC_$ceiling, no shared library but libc's own"
