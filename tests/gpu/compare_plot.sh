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
{
    echo "set terminal pngcairo size 1100,460 font 'sans,10'; set output '$output'; set datafile separator ','"
    echo "set title '$title'; set xlabel 'seconds since the command'; set ylabel 'tokens a second'"
    echo "set yrange [0:*]; set grid; set key bottom right; set arrow from 0, graph 0 to 0, graph 1 nohead dt 2"
    echo "plot '$folder/restart.csv' skip 1 with steps lc rgb '#999999' lw 2 title 'restart', \\"
    echo "     '$folder/blocking.csv' skip 1 with steps lc rgb '#3366cc' lw 2 title 'all stop, weights from one sender, EPLB from scratch', \\"
    echo "     '$eep' skip 1 with steps lc rgb '#cc3311' lw 2 title 'eep'"
} | gnuplot
