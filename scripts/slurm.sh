#!/bin/bash
# One run on several nodes, which requeues itself until it is done:
#
#   sbatch scripts/slurm.sh experiment=edaformer_base_ade20k data.root=/data/ade20k
#   NAME=mine sbatch --nodes=4 --time=08:00:00 scripts/slurm.sh experiment=...
#
# Options of sbatch on its command line beat those here.
#SBATCH --job-name=segtrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8         # one process for each GPU
#SBATCH --cpus-per-task=8           # one trains, the others load images
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300           # seconds before the limit: a checkpoint is written, then 138
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

run=runs/${NAME:-segtrain-$SLURM_JOB_ID}
if [ -e "$run/config.yaml" ]; then
    arguments=("resume=$run")
else
    arguments=(
        "name=${run#runs/}"
        "trainer.devices=$SLURM_NTASKS_PER_NODE"
        "trainer.num_nodes=$SLURM_NNODES"
        "$@"
    )
fi
srun --kill-on-bad-exit=1 uv run --no-sync train.py "${arguments[@]}"
status=$?
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
