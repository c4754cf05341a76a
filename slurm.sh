#!/bin/bash
# Trains on several nodes under Slurm, with one torchrun on each:
#
#     OUT_DIR=log/big sbatch slurm.sh --micro-batch-size 32       # and any other flags of train.py
#
# The checkout, the shards and OUT_DIR must be where all nodes see them. Two minutes before its time is over, the job saves and
# queues itself again. If it is preempted or a node fails, Slurm queues it again. It then resumes from the newest checkpoint.
# If a restart can't help, OUT_DIR/failed.txt says why.
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

out_dir=${OUT_DIR:-log}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it, torchrun rejects a restarted host (docs/rented-machines.md)

# srun and torchrun pass SIGTERM on to the processes; Slurm sends it by itself when it preempts or cancels the job
trap 'late=yes; kill -TERM $srun' USR1
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
  --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$((10000 + SLURM_JOB_ID % 20000))" \
  train.py --out-dir "$out_dir" $(test -e "$out_dir/run.json" && echo --resume) "$@" &
srun=$!
wait $srun
status=$?
if [ -n "$late" ]; then # the signal ended the first wait
  wait $srun || cat "$out_dir/failed.txt" 2>/dev/null || scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
