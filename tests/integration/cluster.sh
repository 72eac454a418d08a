# A cluster on loopback, for shell tests and for hands:
#
#     . tests/integration/cluster.sh
#     cluster_open build            # programs are taken from this folder; everything else lives in a temporary one
#     cluster_coordinator [option...]
#     cluster_agent gpu0 [option...]
#     cluster_engine gpu0 [option...]
#     eepctl status
#     cluster_close                 # also at exit: no process and no file stays behind
#
# Processes are known and stopped by their pid only.  Logs: $CLUSTER/NAME.log.

cluster_open()
{
    CLUSTER_BUILD=$(cd "${1:-build}" && pwd) || return 1
    CLUSTER=$(mktemp -d "${TMPDIR:-/tmp}/eep-sh.XXXXXX") || return 1
    CLUSTER_PIDS=
    EEP_COORDINATOR=unix:$CLUSTER/coordinator.sock
    export EEP_COORDINATOR
    trap cluster_close EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

eepctl()
{
    "$CLUSTER_BUILD/eepctl" "$@"
}

# cluster_spawn NAME COMMAND...: in the background, its log in $CLUSTER/NAME.log, its pid in $CLUSTER/NAME.pid
cluster_spawn()
{
    cluster_name=$1
    shift
    "$@" >>"$CLUSTER/$cluster_name.log" 2>&1 &
    echo $! >"$CLUSTER/$cluster_name.pid"
    CLUSTER_PIDS="$CLUSTER_PIDS $!"
}

cluster_pid()
{
    cat "$CLUSTER/$1.pid"
}

# cluster_signal NAME SIGNAL: sends it and waits for the end, if it is one that ends a process
cluster_signal()
{
    cluster_target=$(cluster_pid "$1")
    kill -"$2" "$cluster_target" || return 1
    case $2 in TERM | KILL | INT) wait "$cluster_target" 2>/dev/null ;; esac
    return 0
}

# cluster_wait SECONDS COMMAND...: until it succeeds
cluster_wait()
{
    cluster_left=$(($1 * 10))
    shift
    until "$@" >/dev/null 2>&1; do
        cluster_left=$((cluster_left - 1))
        [ "$cluster_left" -gt 0 ] || { echo "timed out: $*" >&2; return 1; }
        sleep 0.1
    done
}

cluster_coordinator()
{
    cluster_spawn coordinator "$CLUSTER_BUILD/eep-coordinator" --listen "$EEP_COORDINATOR" \
        --state "$CLUSTER/state" "$@"
    cluster_wait 10 eepctl version
}

cluster_agent()
{
    cluster_id=$1
    shift
    cluster_spawn "$cluster_id" "$CLUSTER_BUILD/eep-agent" --id "$cluster_id" --coordinator "$EEP_COORDINATOR" \
        --engine-socket "$CLUSTER/$cluster_id.sock" "$@"
    cluster_wait 10 test -S "$CLUSTER/$cluster_id.sock"
}

cluster_engine()
{
    cluster_id=$1
    shift
    cluster_spawn "engine-$cluster_id" "$CLUSTER_BUILD/tests/eep-engine" --socket "$CLUSTER/$cluster_id.sock" "$@"
}

cluster_engine_attached()
{
    eepctl agents -o json |
        python3 -c 'import json, sys
wanted = set(sys.argv[1:])
sys.exit(not wanted <= {a["member"]["id"] for a in json.load(sys.stdin)["agents"] if a["engine"]})' "$@"
}

cluster_close()
{
    trap - EXIT INT TERM
    [ -n "$CLUSTER" ] || return 0
    for cluster_target in $CLUSTER_PIDS; do
        kill -KILL "$cluster_target" 2>/dev/null
    done
    wait 2>/dev/null
    [ -n "$CLUSTER_KEEP" ] && echo "kept: $CLUSTER" >&2 || rm -rf "$CLUSTER"
    CLUSTER=
}
