#!/bin/sh
# make plot: docs/placement.png, balance against arrivals: ours, EPLB from scratch, vLLM's policy.  Needs gnuplot.
#
#   tests/placement/plot.sh build/tests/bench_planner docs/placement.png
set -eu
bench=${1:?usage: plot.sh BENCH_PLANNER OUTPUT.png}
output=${2:?usage: plot.sh BENCH_PLANNER OUTPUT.png}
command -v gnuplot >/dev/null || { echo "plot.sh: gnuplot is not installed (Debian: gnuplot-nox)" >&2; exit 1; }
points=$(mktemp -d)
trap 'rm -rf "$points"' EXIT
"$bench" --points >"$points/all"
cases=$(cut -d' ' -f1 "$points/all" | uniq)
for case in $cases; do
    for policy in uneven even eplb vllm; do
        awk -v c="$case" -v p="$policy" '$1 == c && $2 == p { print $3, $4 }' "$points/all" | sort -n >"$points/$case.$policy"
    done
done
{
    echo "set terminal pngcairo size 1200,720 font 'sans,10'"
    echo "set output '$output'"
    echo "set multiplot layout 2,3 title 'Balance against arrivals per layer (log-normal load, drift 0.3)'"
    echo "set xlabel 'experts that arrive, per layer'; set ylabel 'mean load over highest'; set key bottom right; set grid"
    echo "set yrange [*:1.005]; set xrange [0:*]"
    for case in $cases; do
        title=$(echo "$case" | awk -F- '{ print $1 " experts, " $2 " -> " $3 " ranks of " $4 }')
        echo "set title '$title'"
        echo "plot '$points/$case.uneven' with linespoints pt 7 ps 0.7 title 'elastic', \\"
        echo "     '$points/$case.even' with linespoints pt 6 ps 0.7 title 'elastic, even shares', \\"
        echo "     '$points/$case.vllm' with points pt 9 ps 1.6 title 'vLLM policy', \\"
        echo "     '$points/$case.eplb' with points pt 5 ps 1.4 title 'EPLB from scratch'"
    done
    echo "unset multiplot"
} | gnuplot
