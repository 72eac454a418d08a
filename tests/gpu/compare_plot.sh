#!/bin/sh
# Tokens a second while 2 ranks become 4, side by side, as a picture, from what compare.py left.  Needs gnuplot.
#
#   tests/gpu/compare_plot.sh FOLDER OUTPUT.png [TITLE]     (FOLDER: with quiet.csv, blocking.csv, restart.csv, eep*.csv)
set -eu
folder=${1:?usage: compare_plot.sh FOLDER OUTPUT.png [TITLE]}
output=${2:?usage: compare_plot.sh FOLDER OUTPUT.png [TITLE]}
title=${3:-the same requests while 2 ranks become 4}
command -v gnuplot >/dev/null || { echo "compare_plot.sh: gnuplot is not installed (Debian: gnuplot-nox)" >&2; exit 1; }
eep=$folder/eep.csv
[ -e "$eep" ] || eep=$folder/eep-cuda_peer.csv
# Means of a second: a token of every row comes with every step.
mean() { awk -F, 'NR > 1 { s = int($1 + 1000) - 1000; if (s != at && n) { print at "," sum / n; sum = n = 0 } at = s; sum += $2; n++ } END { if (n) print at "," sum / n }' "$1"; }
seconds=$(mktemp -d)
trap 'rm -rf "$seconds"' EXIT
for side in "$folder/restart.csv" "$folder/blocking.csv" "$eep"; do mean "$side" >"$seconds/${side##*/}"; done
{
    echo "set terminal pngcairo size 1100,460 font 'sans,10'; set output '$output'; set datafile separator ','"
    echo "set title \"$title\"; set xlabel 'seconds since the command'; set ylabel 'tokens a second'"
    echo "set yrange [0:*]; set grid; set key top right; set arrow from 0, graph 0 to 0, graph 1 nohead dt 2"
    echo "plot '$seconds/restart.csv' with steps lc rgb '#999999' lw 2 title 'restart', \\"
    echo "     '$seconds/blocking.csv' with steps lc rgb '#3366cc' lw 2 title 'all stop, weights from one sender, EPLB from scratch', \\"
    echo "     '$seconds/${eep##*/}' with steps lc rgb '#cc3311' lw 2 title 'eep'"
} | gnuplot
