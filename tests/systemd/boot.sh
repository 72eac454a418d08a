#!/usr/bin/env bash
# The units, started by a systemd of their own in namespaces, in a Debian 12 tree made by debootstrap: a coordinator, two
# agents, two engines under load.  Scaling, kill -9 of each, restart, reload and stop, as an operator does them.
#
#   tests/systemd/boot.sh BUILD [TREE]          as root; TREE is made if it is not there (needs a Debian mirror)
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$1 base=${2:-$1/debian-tree}
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 77; }

tests/systemd/tree.sh "$base"

d=$(mktemp -d /tmp/eep-systemd.XXXXXX)
init='' outer=''
finish() {
    status=$?
    [ $status = 0 ] || inside journalctl --no-pager -o short -n 60 2>/dev/null || true
    [ -z "$outer" ] || { kill -9 "${init:-$outer}" 2>/dev/null; wait "$outer" 2>/dev/null; } || true
    umount -l "$d/tree" "$d" 2>/dev/null || true
    rm -rf "$d"
}
trap finish EXIT
passed=0
pass() { passed=$((passed + 1)); printf 'ok    %s\n' "$*"; }
fail() { printf 'FAIL  %s\n' "$*" >&2; exit 1; }
inside() { nsenter -t "$init" -m -p -u -i -n -C -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
until_true() { # seconds, command...: within so long
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $end ] || return 1; sleep 0.2; done
}

# ---- the tree: the base stays as it is ----
mount -t tmpfs tmpfs "$d"
mkdir "$d/upper" "$d/work" "$d/tree"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$d/upper,workdir=$d/work" "$d/tree"
tree=$d/tree
make --no-print-directory -s install BUILD="$build" DESTDIR="$tree" PREFIX=/usr >/dev/null
install -m 755 "$build/tests/eep-engine" "$build/tests/eep-feeder" "$tree/usr/bin"
mkdir -p "$tree/models" "$tree/etc/eep"
cp -R tests/data/qwen3-moe-tiny "$tree/models/qwen"
rm -f "$tree"/etc/systemd/system/*.wants/*
cat >"$tree/etc/eep/coordinator.conf" <<'END'
[coordinator]
slots = 16
min-ranks = 1
lead-ms = 100
listen = 127.0.0.1:7420
END
# Credentials: root's files alone.  gpu0 comes by TCP, gpu1 by the unix socket; bare has no certificate.
systemd/eep-ca init "$d/ca"
for role in coordinator operator agent/gpu0 agent/gpu1; do systemd/eep-ca issue "$d/ca" eep $role; done
mkdir -p "$tree/etc/eep/tls"
install -m 600 "$d"/ca/ca.crt "$d"/ca/{coordinator,operator,agent-gpu0,agent-gpu1}.{crt,key} "$tree/etc/eep/tls"
printf '[agent]\ncoordinator = 127.0.0.1:7420\n' >"$tree/etc/eep/agent-gpu0.conf"
cat >"$tree/etc/eep/agent.conf" <<'END'
[agent]
checkpoint = /models/qwen
END
cat >"$tree/etc/systemd/system/engine@.service" <<'END'
[Unit]
Description=engine for agent %i
[Service]
ExecStart=/usr/bin/eep-engine --socket /run/eep/agent-%i.sock --step-ms 2 --attach-ms 60000
User=eep
Restart=on-failure
END

# ---- boot ----
unshare -m -p -f -u -i -n -C tests/systemd/enter.sh "$tree" >"$d/console" 2>&1 &
outer=$!
until_true 10 pgrep -P "$outer" || { cat "$d/console"; fail "nothing was started"; }
init=$(pgrep -P "$outer")
inside_state() { [ "$(inside systemctl is-system-running 2>/dev/null)" != offline ] && inside test -S /run/systemd/private; }
until_true 30 inside_state || { cat "$d/console"; fail "systemd does not run"; }
running() { case $(inside systemctl is-system-running 2>/dev/null) in running | degraded) ;; *) return 1 ;; esac; }
until_true 60 running || { cat "$d/console"; fail "systemd: $(inside systemctl list-jobs --no-pager 2>&1)"; }
pass "systemd $(inside systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p') is $(inside systemctl is-system-running)"

inside systemd-sysusers
inside systemd-tmpfiles --create /usr/lib/tmpfiles.d/eep.conf
active() { [ "$(inside systemctl is-active "$1")" = active ]; }
pid_of() { inside systemctl show -p MainPID --value "$1"; }
status_of() { inside systemctl show -p StatusText --value "$1"; }
said() { inside journalctl --no-pager -u "$1" -o cat | grep -q -- "$2"; }
view_says() { inside eepctl status | grep -q -- "$1"; }

inside systemctl start eep-coordinator.service || fail "the coordinator does not start: $(inside systemctl status --no-pager eep-coordinator 2>&1)"
pass "coordinator: READY, $(status_of eep-coordinator)"
inside timeout 30 systemctl enable -q --now eep-agent@gpu0 eep-agent@gpu1 ||
    fail "the agents do not start: $(inside systemctl status --no-pager eep-agent@gpu0 2>&1)"
inside eepctl agents | grep -c 'gpu[01] *spare' | grep -qx 2 || fail "an agent was READY before the coordinator had it: $(inside eepctl agents)"
pass "agents: READY once they are registered"
by_tls() { inside eepctl -c 127.0.0.1:7420 --tls-cert /etc/eep/tls/operator.crt --tls-key /etc/eep/tls/operator.key \
    --tls-ca /etc/eep/tls/ca.crt "$@"; }
by_tls agents | grep -q gpu0 || fail "TLS: $(by_tls agents 2>&1)"
inside eepctl -c 127.0.0.1:7420 status >/dev/null 2>&1 && fail "TLS: a plain client was taken"
said eep-agent@gpu0 "^coordinator-connected .*127.0.0.1:7420" || fail "gpu0 did not come by TLS"
inside timeout 30 systemctl start eep-agent@bare || fail "an agent without a certificate does not start"
inside systemctl stop eep-agent@bare
pass "credentials: certificates that only root can read; a unit without them starts, too"
inside systemctl start engine@gpu0 engine@gpu1

# ---- scaling, under load ----
inside eepctl scale --to 1 >"$d/scale" 2>&1 || fail "scale --to 1: $(cat "$d/scale")"
inside systemd-run -q --unit=feeder --property=User=eep --property=RemainAfterExit=yes \
    eep-feeder --coordinator unix:/run/eep/coordinator.sock --data /models/qwen --until-file /tmp/stop --report /tmp/report.json
inside eepctl scale --to 2 >"$d/scale" 2>&1 || fail "scale --to 2: $(cat "$d/scale")"
inside journalctl --no-pager -u eep-coordinator -u 'eep-agent@*' -o short-iso >"$build/systemd-journal.txt" # as an operator reads it
cp "$d/scale" "$build/systemd-scale.txt"
pass "scaled 1 -> 2"

# ---- deaths ----
again() { # unit, its former process
    active "$1" && [ "$(pid_of "$1")" != "$2" ] && [ "$(pid_of "$1")" != 0 ]
}
killed() { # unit
    local before
    before=$(pid_of "$1")
    inside kill -9 "$before"
    until_true 20 again "$1" "$before" || fail "$1 does not come back: $(inside systemctl status --no-pager "$1" 2>&1)"
}
killed eep-coordinator.service
until_true 20 view_says "2 ranks, epoch" || fail "after kill -9 of the coordinator: $(inside eepctl status)"
pass "kill -9 of the coordinator"
epoch=$(inside eepctl -o json status | sed -n 's/.*"epoch": *"\{0,1\}\([0-9]*\).*/\1/p' | head -n 1)
killed eep-agent@gpu0.service
until_true 10 said eep-agent@gpu0 readopted=yes || fail "the next process does not re-adopt"
until_true 20 view_says "2 ranks, epoch $epoch," || fail "the view has changed: $(inside eepctl status)"
pass "kill -9 of an agent: weights and view are kept"
before=$(pid_of eep-agent@gpu1.service)
inside systemctl restart eep-agent@gpu1.service || fail "restart"
again eep-agent@gpu1.service "$before" || fail "restart does not restart"
said eep-agent@gpu1 "^handing-over " || fail "restart does not hand over"
until_true 20 view_says "2 ranks, epoch $epoch," || fail "a restart has changed the view: $(inside eepctl status)"
[ "$(inside journalctl --no-pager -u eep-agent@gpu1 -o cat | grep -c readopted=yes)" = 1 ] || fail "a restart loses the weights"
pass "systemctl restart of an agent: weights and view are kept"
inside eepctl verify >"$d/verify" 2>&1 || fail "verify: $(cat "$d/verify")"
pass "all weights are whole"

# ---- reload, restart of the coordinator, what the status says ----
for unit in eep-coordinator eep-agent@gpu0; do
    inside systemctl reload $unit || fail "reload of $unit"
    until_true 10 said $unit "^reloaded " || fail "$unit does not reload"
    until_true 10 active $unit || fail "$unit after its reload: $(inside systemctl is-active $unit)"
done
pass "reload"
until_true 10 eval 'status_of eep-coordinator | grep -q "2 ranks, epoch"' || fail "status: $(status_of eep-coordinator)"
pass "status: $(status_of eep-coordinator)"
inside systemctl restart eep-coordinator.service
inside test -S /run/eep/coordinator.sock || fail "the socket has gone with the coordinator"
pass "systemctl restart of the coordinator"
systemd/eep-ca issue "$d/ca" eep coordinator 20
cat "$d/ca/coordinator.crt" | inside tee /etc/eep/tls/coordinator.crt >/dev/null
cat "$d/ca/coordinator.key" | inside tee /etc/eep/tls/coordinator.key >/dev/null
inside systemctl reload eep-coordinator
until_true 10 said eep-coordinator "a new one waits for a restart" || fail "a reload does not say that credentials stay"
said eep-coordinator "^certificate-expires" && fail "a reload has taken the new credential: say so in docs/tls.md"
inside systemctl restart eep-coordinator
until_true 10 said eep-coordinator "^certificate-expires" || fail "the new certificate has not come with a restart"
until_true 20 by_tls status || fail "TLS with the new certificate: $(by_tls status 2>&1)"
pass "a new certificate comes with a restart"

# ---- a stop drains ----
until_true 20 view_says "2 ranks, epoch $epoch," || fail "$(inside eepctl status)"
inside systemctl stop eep-agent@gpu1.service
[ "$(inside systemctl show -p Result --value eep-agent@gpu1)" = success ] || fail "the stop was no clean one"
view_says "1 ranks" || fail "a stopped agent is still in the view: $(inside eepctl status)"
pass "stop drains"

inside touch /tmp/stop
fed() { [ "$(inside systemctl show -p SubState --value feeder)" = exited ]; }
until_true 60 fed || fail "the feeder: $(inside systemctl status --no-pager feeder 2>&1)"
inside cat /tmp/report.json >"$d/report"
grep -q '"wrong": 0' "$d/report" || fail "wrong tokens: $(cat "$d/report")"
pass "the load: $(tr -d '\n ' <"$d/report" | grep -oE '"(issued|completed|wrong)":[0-9]+' | tr '\n' ' ')"
inside systemctl stop eep-agents.target eep-coordinator.socket eep-coordinator.service
[ "$(inside systemctl show -p Result --value eep-coordinator)" = success ] || fail "the coordinator's stop"
pass "stop of all"
printf '%d passed, 0 failed\n' "$passed"
