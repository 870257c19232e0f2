#!/bin/sh
# PreAct-ResNet-18 on CIFAR-10 by four trainers, each by its paper's recipe but for what is set here, then AutoAttack on 1,000 test
# images and an entry on a board. DATA is the folder of torchvision's data sets, or one .npz file with a copy of CIFAR-10 (see
# `robustlab explain cifar10`). Stopped and started again it goes on where it was.
#
#   EPOCHS=3 scripts/train_cifar10.sh DATA [OUT] [BOARD]        for example: data runs/cifar10 leaderboards/cifar10-linf
#
# EPOCHS (default: the recipe's; backward-smoothing gets three times as many, at a third of the passes), BATCH, DEVICE (cuda),
# PRECISION (bf16), NAMES.
set -eu
data=$1 out=${2:-runs/cifar10} board=${3:-leaderboards/cifar10-linf}
lab() { "${PYTHON:-python}" -m robustlab "$@"; }

for name in ${NAMES:-rice-at trades awp backward-smoothing}; do
    set -- --set training.device="${DEVICE:-cuda}" --set training.precision="${PRECISION:-bf16}" --set training.channels_last=true
    if [ -n "${EPOCHS:-}" ]; then
        epochs=$EPOCHS
        [ "$name" != backward-smoothing ] || epochs=$((3 * EPOCHS))
        set -- "$@" --set training.epochs="$epochs" --set training.probe.every="$epochs" --set "schedule={name: cosine, warmup: 0.5}"
    fi
    [ -z "${BATCH:-}" ] || set -- "$@" --set training.batch_size="$BATCH"
    lab train "configs/cifar10/$name.yaml" --data-root "$data" --out "$out/$name" --resume "$@"
    lab evaluate "$out/$name/best.safetensors" --data-root "$data" --suite autoattack --precision "${PRECISION:-bf16}" \
        --device "${DEVICE:-cuda}" --batch-size 1000 --num-examples 1000 --out "$out/evaluations" --resume
done
mkdir -p "$board"
lab leaderboard add "$out/evaluations" --board "$board"
lab leaderboard build "$board"
