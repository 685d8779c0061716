#!/bin/bash
# A job array, one seed in each task. The same script starts a run and, after each interruption, continues it:
#
#     mkdir -p logs && sbatch examples/slurm/array.sh --env HalfCheetah-v5
#
#SBATCH --job-name=softsac
#SBATCH --array=1-5
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%a.txt

# Slurm signals what srun starts, two minutes before the time limit: the run then saves a checkpoint and exits with 143
srun python examples/preemptible.py --seed "$SLURM_ARRAY_TASK_ID" --folder "runs/$SLURM_ARRAY_TASK_ID" "$@"
status=$?
# No exit status makes Slurm itself start a job again. $SLURM_JOB_ID would mean the whole array in one of its tasks
[ $status -eq 143 ] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
exit $status
