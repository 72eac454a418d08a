#!/usr/bin/env bash
# The two tarballs of `make bundle` and `make bundle-test`, unpacked into an empty folder and run from there with an empty
# environment: what they ask of a system (elf.sh), a small cluster and the demo on loopback, install.sh, and linking
# against libeep.
#
#   tests/bundle/check.sh TARBALL TESTS-TARBALL [gpu]      (gpu: the build had CUDA's headers)
set -euo pipefail

tarball=$(realpath "$1") instruments=$(realpath "$2") gpu=${3:-}
source=$(cd "$(dirname "$0")/../.." && pwd)
d=$(mktemp -d /tmp/eep-bundle.XXXXXX)
pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
    rm -rf "$d"
}
trap finish EXIT
passed=0
pass() { passed=$((passed + 1)); printf 'ok    %s\n' "$*"; }
fail() { printf 'FAIL  %s\n' "$*" >&2; tail -n 20 "$d"/*.log >&2 2>/dev/null || true; exit 1; }

cd "$d"
tar -xzf "$tarball" && tar -xzf "$instruments"
[ "$(find . -mindepth 1 -maxdepth 1 | wc -l)" = 2 ] || fail "a tarball has more than one folder at its top"
top=$d/$(basename "$tarball" .tar.gz) tests=$d/$(basename "$instruments" .tar.gz)
[ -z "$(find "$tests" \( -name '*.so' -o -name '*.so.*' \) ! -name 'libeep.so*')" ] || fail "a foreign library is in the tarball"
[ -z "$(tar -tvzf "$instruments" | awk '$2 != "0/0"')" ] || fail "a file in the tarball does not belong to owner 0"
[ "$(tar --full-time -tvzf "$instruments" | awk '{ print $4, $5 }' | sort -u | wc -l)" = 1 ] || fail "files of different times"
pass "layout, owner and time"

found=$("$source/tests/bundle/elf.sh" "$d") || fail "the tarballs ask for more than they may"
! said=$("$source/tests/bundle/elf.sh" "$top" 2.3 2>&1) || fail "elf.sh finds nothing above GLIBC_2.3"
grep -q "bin/eep-agent: __libc_start_main needs GLIBC_2.34, which is above GLIBC_2.3$" <<<"$said" ||
    fail "elf.sh does not name file and symbol: $said"
pass "$found"

said=$(env -i "$top/bin/eep-agent" --list-gpus 2>&1) || true
case $gpu,$said in
gpu,*"no GPU backend"*) fail "the build had CUDA's headers, the agent says: $said" ;;
esac
pass "GPU backend: ${said:-no GPU here}"

start() { env -i "$top/bin/$1" "${@:2}" >"$d/$1.log" 2>&1 & pids+=($!); }
ctl() { env -i "$top/bin/eepctl" -c "unix:$d/c.sock" "$@"; }
start eep-coordinator --state "$d/state" --listen "unix:$d/c.sock"
start eep-agent --id gpu0 --coordinator "unix:$d/c.sock" --engine-socket "$d/gpu0.sock" \
    --checkpoint "$tests/tests/data/qwen3-moe-tiny"
for _ in $(seq 100); do
    ctl agents >"$d/agents.log" 2>&1 && grep -q gpu0 "$d/agents.log" && break
    sleep 0.1
done
grep -q gpu0 "$d/agents.log" || fail "no agent at the coordinator after 10 s"
ctl status >"$d/status.log" || fail "eepctl status"
pass "coordinator, agent, eepctl status"

(cd "$tests" && env -i bin/tests/eep-demo) >"$d/demo.log" 2>&1 || fail "the demo"
grep -q '^good: ' "$d/demo.log" || fail "the demo does not say that it is good"
pass "demo"
env -i "$tests/bin/tests/test_memory" >"$d/memory.log" 2>&1 || fail "test_memory"
for program in test_transport_gpu nccl_abort $(cd "$tests/bin/tests" && ls | grep -E "^bench_(peer|nccl|several)$"); do # without a GPU they have nothing to do; they must start
    rc=0
    timeout 300 env -i "$tests/bin/tests/$program" >"$d/$program.log" 2>&1 || rc=$?
    [ $rc = 0 ] || [ $rc = 77 ] || fail "$program: exit status $rc"
done
for file in $(grep -ho 'tests/gpu/[a-z_]*\.[a-z]*' "$tests"/tests/gpu/*.sh | sort -u); do
    [ -e "$tests/$file" ] || fail "a script of tests/gpu runs $file, which is not in the bundle"
done
said=$(env -i PATH="$PATH" GPUS=99 "$tests/tests/gpu/several.sh" "$tests/bin" "$d/several" 2>&1) && fail "several.sh runs on 99 GPUs"
grep -q 'GPUs here, 99 wanted' <<<"$said" && [ "$(wc -l <<<"$said")" = 1 ] || fail "several.sh does not say in a sentence that it needs GPUs: $said"
pass "test programs"

if command -v python3 >/dev/null; then
    env -i PATH="$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$top/python" python3 -c '
import sys, eep
with eep.attach(sys.argv[1], endpoint="python") as engine:
    print("attached, device", engine.device)' "$d/gpu0.sock" >"$d/python.log" 2>&1 || fail "the Python package: $(cat "$d/python.log")"
    pass "an engine in Python, with the libeep of the tarball"
fi

# As `make install` does it, and the static library besides.
env -i PATH="$PATH" sh "$top/install.sh" "$d/prefix" >/dev/null || fail "install.sh"
env -i PATH="$PATH" sh "$top/install.sh" "$d/prefix" >/dev/null || fail "install.sh, again"
(cd "$d/prefix" && find . ! -type d -printf '%P %m\n' | grep -v -e '^lib/libeep\.a ' -e '^share/doc/eep/licenses/' | sort) >"$d/got"
make -C "$source" --no-print-directory -s install BUILD="$(dirname "$tarball")/bundle" LINK=static \
    DESTDIR="$d/make" PREFIX="$d/prefix" >/dev/null
(cd "$d/make$d/prefix" && find . ! -type d -printf '%P %m\n' | sort) >"$d/expected"
diff "$d/expected" "$d/got" || fail "install.sh and make install differ"
diff -r "$d/make$d/prefix/lib/systemd" "$d/prefix/lib/systemd" || fail "the units of install.sh and make install differ"
sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$d"/prefix/lib/systemd/system/*.service >"$d/programs"
while read -r program; do [ -x "$program" ] || fail "a unit starts $program, which is not there"; done <"$d/programs"
[ -s "$d/programs" ] || fail "the units start nothing"
for prefix in relative '/tmp/a b' "/tmp/a|b"; do
    rc=0
    sh "$top/install.sh" "$prefix" 2>/dev/null || rc=$?
    [ $rc = 2 ] || fail "install.sh takes the prefix '$prefix'"
done
pass "install.sh"

# An engine that attaches to the agent above; one of its names is also a name inside eep.
cat >"$d/engine.c" <<'END'
#include <eep.h>
#include <stdio.h>
int err_set(void);
int err_set(void)
{
    return 0;
}
static void on_event(void *user, const struct eep_event *event)
{
    (void)user, (void)event;
}
int main(int argc, char **argv)
{
    struct eep *eep = NULL;
    struct eep_options options = {.socket = argc > 1 ? argv[1] : NULL, .endpoint = "engine",
                                  .dispatch = EEP_DISPATCH_SOURCE_ROUTED, .on_event = on_event};
    if (eep_attach(&options, &eep) < 0) {
        printf("%s\n", eep_last_error());
        return 1;
    }
    eep_detach(eep);
    return err_set();
}
END
cc=${CC:-gcc}
"$cc" -Wall -Werror -I"$d/prefix/include" -o "$d/shared" "$d/engine.c" -L"$d/prefix/lib" -leep
"$cc" -Wall -Werror -I"$d/prefix/include" -o "$d/static" "$d/engine.c" "$d/prefix/lib/libeep.a" -lpthread
env -i LD_LIBRARY_PATH="$d/prefix/lib" "$d/shared" "$d/gpu0.sock" || fail "an engine with libeep.so"
env -i "$d/static" "$d/gpu0.sock" || fail "an engine with libeep.a"
mkdir "$d/engine" && mv "$d/static" "$d/engine"
"$source/tests/bundle/elf.sh" "$d/engine" >/dev/null || fail "libeep.a asks for more than it may"
pass "an engine with libeep.so and libeep.a"
printf '%d passed, 0 failed\n' "$passed"
