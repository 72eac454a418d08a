#!/bin/sh
# Every event that the source logs stands in docs/messages.md, and every event there is logged.
set -eu
cd "$(dirname "$0")/../.."
d=$(mktemp -d /tmp/eep-messages.XXXXXX)
trap 'rm -rf "$d"' EXIT
# the calls, one a line; of each the literals before the format of its pairs
find common coordinator agent -name '*.c' ! -name 'log*.c' -exec cat {} + | tr '\n' ' ' | sed 's/log_event(/\n&/g' |
    grep '^log_event(' | sed 's/;.*//' | awk -F'"' '{
        for (i = 2; i <= NF; i += 2) { if ($i ~ /=/) break; if ($i ~ /^[a-z]+(-[a-z]+)*$/) print $i } }' | sort -u >"$d/source"
sed -n '/^| event | daemon/,/^$/s/^| `\([a-z-]*\)`.*/\1/p' docs/messages.md | sort >"$d/docs"
[ "$(wc -l <"$d/source")" -gt 40 ] || { echo "the source is not understood"; exit 1; }
comm -23 "$d/source" "$d/docs" | sed 's/$/: is logged, but not in docs\/messages.md/' >"$d/wrong"
comm -13 "$d/source" "$d/docs" | sed 's/$/: is in docs\/messages.md, but not logged/' >>"$d/wrong"
if [ -s "$d/wrong" ]; then cat "$d/wrong"; exit 1; fi
echo "$(wc -l <"$d/docs") messages: passed"
