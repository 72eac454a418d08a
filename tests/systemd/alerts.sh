#!/bin/sh
# The alert rules: promtool takes them, and they fire when they should.  Without promtool skipped, but not in CI.
set -eu
cd "$(dirname "$0")/../.."
command -v promtool >/dev/null || {
    echo "promtool is not installed (make deps-test)"
    [ "${CI:-}" = true ] && exit 1
    exit 77
}
promtool check rules systemd/eep.rules.yml
promtool test rules tests/systemd/alerts.yml
echo "rules passed"
