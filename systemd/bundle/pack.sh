#!/bin/sh
# Puts a bundle together from a folder where `make bundle-programs` has built; the same input gives the same bytes.
#
#   systemd/bundle/pack.sh BUILD TARBALL [TEST PROGRAM...]
#
# With test programs, they are in bin/tests, and what they read in tests: the instruments find both from the top folder.
# All files get the time of $SOURCE_DATE_EPOCH, or else of the last commit.
set -eu
umask 022

epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
build=$1 tarball=$2
shift 2
name=$(basename "$tarball" .tar.gz)
stage=$build/stage
top=$stage/$name
copyright() { # package...: the licence of a library that is inside the programs has to travel with them
    for package; do
        install -m 644 "/usr/share/doc/$package/copyright" "$top/share/doc/eep/licenses/$package"
    done
}

rm -rf "$stage"
mkdir -p "$top/share/doc/eep/licenses"
make --no-print-directory -s install BUILD="$build" LINK=static DESTDIR="$stage/root" PREFIX=/usr/local
cp -R "$stage/root/usr/local/." "$top"
install -m 644 "$build/whole/libeep.a" "$top/lib"
install -m 755 systemd/bundle/install.sh "$top"
install -m 644 systemd/bundle/INSTALL "$top"
find agent/python -name '*.py' -o -name '*.toml' -o -name py.typed | while read -r file; do
    install -D -m 644 "$file" "$top/${file#agent/}"
done
copyright libevent-dev libprotobuf-c-dev liblmdb-dev libjansson-dev libinih-dev libssl-dev

if [ $# -gt 0 ]; then
    mkdir -p "$top/bin/tests" "$top/tests/gpu" "$top/tests/bench"
    for program; do
        install -m 755 "$build/tests/$program" "$top/bin/tests"
    done
    install -m 755 tests/gpu/*.sh tests/gpu/*.py "$top/tests/gpu"
    install -d "$top/tests/python"
    install -m 644 tests/python/*.py "$top/tests/python"
    install -m 755 tests/bench/*.sh "$top/tests/bench"
    cp -R tests/data "$top/tests"
    copyright check libsubunit-dev
fi

find "$top/bin" "$top/lib" -type f | while read -r file; do
    case $file in
    "$top"/lib/*/* | */eep-ca | *.sh) ;; # no programs
    *.a) strip -D --strip-debug "$file" ;;
    *) strip -D --strip-unneeded "$file" ;;
    esac
done
tar -C "$stage" --sort=name --format=gnu --mtime="@$epoch" --owner=0 --group=0 --numeric-owner \
    --mode='u=rwX,go=rX' -cf "$stage/tar" "$name"
gzip -9n <"$stage/tar" >"$tarball"
echo "$tarball: $(du -h --apparent-size "$tarball" | cut -f1)"
rm -rf "$stage"
