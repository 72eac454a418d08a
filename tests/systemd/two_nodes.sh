#!/usr/bin/env bash
# Two hosts, as network namespaces, with TLS: the commands of a first cluster.  A coordinator and an agent on one, an agent
# on the other; engines; scaling 1 -> 2 -> 1 under load, an operator who comes over the network.
#
#   tests/systemd/two_nodes.sh BUILD          as root
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(realpath "$1")
[ "$(id -u)" = 0 ] && unshare -n true 2>/dev/null || { echo "needs root and network namespaces"; exit 77; }
d=$(mktemp -d /tmp/eep-nodes.XXXXXX)
a=eepa$$ b=eepb$$ pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    sleep 0.3
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    ip netns del $a 2>/dev/null || true
    ip netns del $b 2>/dev/null || true
    rm -rf "$d"
}
trap finish EXIT
fail() { echo "FAIL  $*" >&2; tail -n 8 "$d"/*.log >&2; exit 1; }
on() { ip netns exec "$@"; }
start() { # namespace, log, command...
    local ns=$1 log=$2
    shift 2
    ip netns exec "$ns" "$@" >"$d/$log.log" 2>&1 &
    pids+=($!)
}

ip netns add $a && ip netns add $b
ip -n $a link add eth0 type veth peer name eth0 netns $b
for ns in $a $b; do ip -n $ns link set lo up; ip -n $ns link set eth0 up; done
ip -n $a addr add 10.77.0.1/24 dev eth0
ip -n $b addr add 10.77.0.2/24 dev eth0

systemd/eep-ca init "$d/ca"
for role in coordinator operator agent/a0 agent/b0; do systemd/eep-ca issue "$d/ca" eep $role; done
tls() { echo "--tls-cert $d/ca/$1.crt --tls-key $d/ca/$1.key --tls-ca $d/ca/ca.crt"; }
agent() { # namespace, address, id, node, more
    start "$1" "$3" "$bin/eep-agent" --id "$3" --node "$4" --coordinator 10.77.0.1:7420 --listen "$2:0" --data-listen "$2:0" \
        --data-insecure --engine-socket "$d/$3.sock" $(tls "agent-$3") "${@:5}"
    start "$1" "engine-$3" "$bin/tests/eep-engine" --socket "$d/$3.sock" --listen "$2:0" --step-ms 2 --attach-ms 30000
}
# without TLS nothing listens beyond the loopback
! on $a "$bin/eep-coordinator" --state "$d/state" --listen 10.77.0.1:7420 --check-config 2>/dev/null || fail "plain TCP is taken"
start $a coordinator "$bin/eep-coordinator" --state "$d/state" --slots 16 --min-ranks 1 --lead-ms 100 \
    --listen 10.77.0.1:7420 --listen "unix:$d/c.sock" $(tls coordinator)
agent $a 10.77.0.1 a0 0 --checkpoint tests/data/qwen3-moe-tiny
agent $b 10.77.0.2 b0 1
ctl() { on $b "$bin/eepctl" -c 10.77.0.1:7420 $(tls operator) "$@"; }
for _ in $(seq 100); do
    [ "$(ctl agents 2>/dev/null | grep -c spare)" = 2 ] && break
    sleep 0.2
done
ctl agents >"$d/agents.log" 2>&1 || fail "eepctl agents"
[ "$(grep -c spare "$d/agents.log")" = 2 ] || fail "both agents do not come"
ctl scale --to 1 --wait-for-agents=30 >"$d/scale.log" 2>&1 || fail "scale --to 1"
start $a feeder "$bin/tests/eep-feeder" --coordinator "unix:$d/c.sock" --data tests/data/qwen3-moe-tiny --duration 4 \
    --report "$d/report.json"
feeder=${pids[-1]}
ctl scale --to 2 --wait-for-agents=30 >"$d/scale.log" 2>&1 || fail "scale --to 2"
ctl verify >"$d/verify.log" 2>&1 || fail "verify"
ctl scale --to 1 --remove b0 >"$d/scale.log" 2>&1 || fail "scale --to 1"
wait "$feeder" || fail "the feeder"
grep -q '"wrong": 0' "$d/report.json" || fail "wrong tokens"
! grep -h "level=error\|certificate does not say" "$d"/*.log || fail "errors in the logs"
echo "two nodes with TLS: passed, $(grep -oE '"completed": [0-9]+' "$d/report.json") requests"
