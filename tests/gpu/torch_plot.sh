#!/bin/sh
# Tokens a second of the PyTorch engine while ranks come and go, as a picture, from what torch.sh left.  Needs gnuplot.
#
#   tests/gpu/torch_plot.sh FOLDER OUTPUT.png     (FOLDER: $OUT of torch.sh, with scaled.csv, unscaled.csv, events.txt)
set -eu
folder=${1:?usage: torch_plot.sh FOLDER OUTPUT.png}
output=${2:?usage: torch_plot.sh FOLDER OUTPUT.png}
command -v gnuplot >/dev/null || { echo "torch_plot.sh: gnuplot is not installed (Debian: gnuplot-nox)" >&2; exit 1; }
points=$(mktemp -d)
trap 'rm -rf "$points"' EXIT
begin=$(sed -n '1s/.*begin=//p' "$folder/scaled.csv")
# means over a second: five windows
for run in scaled unscaled; do
    awk -F, '$1 + 0 == $1 { sum += $3; if (++n == 5) { printf "%.1f %.1f\n", $1 - 0.4, sum / n; n = sum = 0 } }' "$folder/$run.csv" >"$points/$run"
done
{
    echo "set terminal pngcairo size 1100,460 font 'sans,10'"
    echo "set output '$output'"
    echo "set title 'PyTorch engine, Qwen3-30B-A3B layers on one shared H100, the same requests with and without scaling'"
    echo "set xlabel 'seconds'; set ylabel 'tokens a second (mean over a second)'; set yrange [0:*]; set grid; set key bottom right"
    awk -v b="$begin" '/scale --to/ { from = $1 - b; name = $2 " " $3 " " $4 }
        / ranks$/ {
            to = $1 - b
            printf "set object rectangle from %.2f, graph 0 to %.2f, graph 1 fs solid 0.15 noborder fc rgb \"#3366cc\" behind\n", from, to
            printf "set label \"%s\" at %.2f, graph 0.97 rotate by -90 font \"sans,8\" offset 0.6,0\n", name, from
        }' "$folder/events.txt"
    echo "plot '$points/unscaled' with lines lc rgb '#999999' lw 2 title 'two ranks throughout', \\"
    echo "     '$points/scaled' with lines lc rgb '#cc3311' lw 2 title '2 -> 4 -> 3 -> 2'"
} | gnuplot
