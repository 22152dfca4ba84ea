# What every rank gets. train.sbatch and debug.sbatch read it on the first node of a job, with the
# project's folder in $home, and srun hands it on to all. Change it to suit your cluster.
# shellcheck shell=bash disable=SC2154 # $home

# Python: an environment that was active when sbatch was called comes along with it, venv or conda;
# where that one has no RankZero, or none was active, the project's own .venv is taken. Or say here
# what to activate:
#   module load cuda
#   source "$HOME/miniconda3/etc/profile.d/conda.sh" && conda activate rankzero
if ! python -P -c 'import pipeline.errors' 2>/dev/null; then
    PATH=$home/.venv/bin:$PATH
fi
if ! python -P -c 'import pipeline.errors'; then
    echo "no Python with RankZero: activate its environment before sbatch, run \`make install\` in $home, or name it in $home/slurm/env.sh" >&2
    exit 1
fi
export PYTHONUNBUFFERED=1

# What srun would take from the job. Every rank sees all GPUs of its node, or those of one node could
# not reach each other's memory; --gpu-bind=none is no way to that, it shows those of other jobs too.
# And srun is told the CPUs of a task, which must not be said twice.
unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK

# Compiled kernels: on the node's own disk, where they are found at once and locks work.
node_cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/rankzero-$UID
export TRITON_CACHE_DIR=$node_cache/triton
export TORCH_EXTENSIONS_DIR=$node_cache/torch_extensions
export TORCHINDUCTOR_CACHE_DIR=$node_cache/inductor
export CUDA_CACHE_PATH=$node_cache/cuda
# Other users' files must not be run, and /tmp is everybody's.
# shellcheck disable=SC2016 # the nodes expand it
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 \
    --export=ALL bash -c 'mkdir -p -m 700 "$0" && [[ -O $0 ]] || { echo "$SLURMD_NODENAME: $0 is not ours alone; set TMPDIR" >&2; exit 1; }' "$node_cache"

# Compute nodes often cannot reach the internet, and training fetches nothing.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}

# The network between nodes: only where the libraries choose the wrong interface.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
