#!/usr/bin/env bash
# Training on several machines under SLURM: sbatch runs/slurm.sh [FILE.py ...] [--key=value ...]
#
# The repository, its .venv, the data and out/ lie on a disk that all machines share. torchrun does
# the rest. Tried with a stand-in for srun, as two nodes of one process on one machine; not yet on
# a cluster.
#SBATCH --job-name=nanolab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # torchrun starts the processes of a node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@90         # before time is up: the run saves and ends
#SBATCH --requeue                # after a node is lost or taken away: --resume goes on
#SBATCH --open-mode=append
set -euo pipefail
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

port=$((20000 + SLURM_JOB_ID % 10000))  # of this job alone
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --shutdown_timeout=80 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:$port" \
    train.py config/cloud_hour.py --resume "$@"
