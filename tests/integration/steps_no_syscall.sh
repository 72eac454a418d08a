#!/bin/sh
# A step boundary with nothing pending makes no system call: an engine that runs 50,000 steps makes as many calls as
# one that runs 1,000, by strace's count over all its threads and by libeep's own counter.
#
# usage: steps_no_syscall.sh BUILD   (needs BUILD/tests/test_libeep and strace; exits 77 when strace cannot run here)
set -eu
build=${1:-build}
probe=$build/tests/test_libeep
command -v strace >/dev/null || { echo "strace is not installed"; exit 77; }
strace -f -o /dev/null true 2>/dev/null || { echo "strace may not trace here"; exit 77; }

dir=$(mktemp -d)
agent=
finish() {
    [ -z "$agent" ] || kill "$agent" 2>/dev/null || true
    rm -rf "$dir"
}
trap finish EXIT
trap 'exit 1' INT TERM

# All calls of one engine, from its start to its end, with $1 steps in between.
run() {
    mkfifo "$dir/hold" "$dir/ready"
    "$probe" probe-agent "$dir/socket" <"$dir/hold" >"$dir/ready" &
    agent=$!
    exec 3>"$dir/hold"
    read -r line <"$dir/ready"
    [ "$line" = ready ]
    strace -f -c -o "$dir/strace" "$probe" probe-engine "$dir/socket" "$1" >"$dir/out"
    exec 3>&-
    wait "$agent"
    agent=
    rm -f "$dir/hold" "$dir/ready"
    read -r _ steps _ counted <"$dir/out"
    [ "$steps" = "$1" ] || { echo "ran $steps steps instead of $1"; exit 1; }
    [ "$counted" = 0 ] || { echo "boundary_syscalls is $counted after $1 steps"; exit 1; }
    calls=$(awk '$NF == "total" { print $4 }' "$dir/strace")
}

run 1000
few=$calls
run 50000
many=$calls
echo "system calls: $few with 1000 steps, $many with 50000"
# The two runs differ by how their threads happened to wait at the start and at the end: far less than one call in
# a thousand steps.
difference=$((many - few))
[ "${difference#-}" -le 40 ] || { echo "step boundaries make system calls"; cat "$dir/strace"; exit 1; }
