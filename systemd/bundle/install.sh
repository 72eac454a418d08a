#!/bin/sh
# Installs what lies beside this file: programs, library, header, systemd units, docs, shell completion.
#
#   sh install.sh [PREFIX]         (default /usr/local; $DESTDIR goes before it for packaging)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
prefix=${1:-/usr/local}
case $prefix in
/*[!A-Za-z0-9/._+-]* | [!/]*)
    echo "install.sh: the prefix '$prefix' must be an absolute path of letters, digits and . _ + -" >&2
    exit 2 ;;
esac
prefix=${prefix%/}
root=${DESTDIR:-}$prefix

copy() { # a folder, with all that is in it
    (cd "$here" && find "$1" -type f) | while read -r file; do
        install -D -m 644 "$here/$file" "$root/$file"
    done
}
for program in eep-coordinator eep-agent eep-keeper eepctl eep-ca; do
    install -D -m 755 "$here/bin/$program" "$root/bin/$program"
done
copy include
for folder in lib/sysusers.d lib/tmpfiles.d share; do copy "$folder"; done
install -D -m 644 "$here/lib/libeep.a" "$root/lib/libeep.a"
install -m 755 "$here/lib/libeep.so.0" "$root/lib/libeep.so.0"
ln -sf libeep.so.0 "$root/lib/libeep.so"
mkdir -p "$root/lib/systemd/system"
for unit in "$here"/lib/systemd/system/*; do
    sed "s|/usr/local|$prefix|g" "$unit" >"$root/lib/systemd/system/${unit##*/}"
    chmod 644 "$root/lib/systemd/system/${unit##*/}"
done
echo "eep is installed in $root"
