#!/bin/sh
# Debian packages of a copy of the tree, and what lintian says about them; an error of its ends this.
#
#   systemd/deb.sh BUILD         writes BUILD/deb/*.deb
set -eu
for tool in dpkg-buildpackage dh help2man lintian; do
    command -v $tool >/dev/null || { echo "packages need $tool: run 'make deps-deb' once as root" >&2; exit 1; }
done
out=$1/deb
rm -rf "$out" && mkdir -p "$out/eep"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$out/eep"
mv "$out/eep/systemd/debian" "$out/eep/debian" # where dpkg-buildpackage looks
unset MAKEFLAGS MFLAGS MAKELEVEL
(cd "$out/eep" && dpkg-buildpackage -b -us -uc) >"$out/log" 2>&1 || { tail -n 30 "$out/log" >&2; exit 1; }
rm -rf "$out/eep"
lintian --fail-on error "$out"/*.changes
ls "$out"/*.deb
