#!/bin/sh
# All trainers on digits: small_cnn, 16 px, linf 0.1, 256 test images, exact AutoAttack, tested against pgd-at. One process on each of
# two cores, then the table of both. Stopped and started again it goes on where it was.
#
#   scripts/compare_digits.sh [OUT] [OPTION...]       for example: runs/compare-digits --seeds 3
set -eu
out=${1:-runs/compare-digits}
[ $# -eq 0 ] || shift
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

compare() { "${PYTHON:-python}" -m robustlab compare "$@" --out "$out" --num-examples 256 --resume; }

# the longest first, dealt out in turn, so that both processes end at about the same time
one= two=
for name in trades-awp mart-awp wt-awp awp krylov-at engm augrmixat rebuffi advlc trades mart engm-approx pgd-at rice-at \
    manifold-iat iat gradalign backward-smoothing free-at slat fast-at n-fgsm standard; do
    one="$one configs/digits/$name.yaml"
    swap=$one one=$two two=$swap
done

# shellcheck disable=SC2086 # lists of names without spaces
compare $one "$@" >/dev/null &
other=$!
trap 'kill "$other" 2>/dev/null || true' EXIT INT TERM
# shellcheck disable=SC2086
compare $two "$@" >/dev/null
wait "$other"
trap - EXIT INT TERM
compare configs/digits/pgd-at.yaml configs/digits/*.yaml "$@"
