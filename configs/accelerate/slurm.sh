#!/bin/bash
# Two nodes of 8 GPUs under Slurm, one task per GPU. The tasks are the trainers themselves, with no launcher in between. So the
# SIGTERM that Slurm sends three minutes before the time limit reaches them, they write a checkpoint, and the requeued job
# resumes from it.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500

srun bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec .venv/bin/python train_text_to_image_ldm.py --config configs/image/text_to_image_32gb.yaml \
        --latents_dir cache/photos --output_dir runs/photos --mixed_precision bf16 --resume_from_checkpoint latest
'
