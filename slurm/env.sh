# Environment of all ranks; change this file for your cluster. train.sbatch and debug.sbatch source it
# on the first node of a job, with the project's folder in $home, and srun passes it to all ranks.
# shellcheck shell=bash disable=SC2154,SC2034 # $home; container is used by the scripts

# To run the ranks in a container: the words that come before `python` on each rank. They are options
# of srun (pyxis) if the first word begins with --, else a command. RankZero must be installed for
# the container's python. $home, the folder in which sbatch is called, the model, the data and
# output_dir must be mounted.
#   container=(--container-image=/images/rankzero.sqsh --container-mounts="$home,$PWD,/scratch")
#   container=(apptainer exec --nv --bind "$home,$PWD,/scratch" /images/rankzero.sif)
container=()

# Run a command in the container or, if there is none, directly.
in_container() {
    if [[ ${container[0]:-} == --* ]]; then
        srun --nodes=1 --ntasks=1 --cpus-per-task=1 --export=ALL "${container[@]}" "$@"
    else
        "${container[@]}" "$@"
    fi
}

# Python: the job uses the venv or conda environment that is active when sbatch is called. If it does
# not have RankZero, the project's own .venv is used. Or activate an environment here:
#   module load cuda
#   source "$HOME/miniconda3/etc/profile.d/conda.sh" && conda activate rankzero
if [[ ${#container[@]} -eq 0 ]] && ! python -P -c 'import pipeline.errors' 2>/dev/null; then
    PATH=$home/.venv/bin:$PATH
fi
if ! in_container python -P -c 'import pipeline.errors'; then
    if [[ ${#container[@]} -ne 0 ]]; then
        echo "no Python with RankZero in the container (${container[*]}): install RankZero in the image, or mount $home and its environment; see container= in $home/slurm/env.sh" >&2
    else
        echo "no Python with RankZero: activate its environment before sbatch, run \`make install\` in $home, or activate the environment in $home/slurm/env.sh" >&2
    fi
    exit 1
fi
export PYTHONUNBUFFERED=1

# Unset options that srun would take from the job. All GPUs of a node must be visible to each rank,
# because otherwise GPUs cannot access each other's memory; --gpu-bind=none would make GPUs of other
# jobs visible too. The scripts pass the CPUs of a task to srun, which may be set only once.
unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK

# Folder for compiled kernels, on the node's own disk, which is fast and supports file locks.
node_cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/rankzero-$UID
export TRITON_CACHE_DIR=$node_cache/triton
export TORCH_EXTENSIONS_DIR=$node_cache/torch_extensions
export TORCHINDUCTOR_CACHE_DIR=$node_cache/inductor
export CUDA_CACHE_PATH=$node_cache/cuda
# The folder must belong to this user, because the kernels in it are executed and all users can
# write to /tmp.
# shellcheck disable=SC2016 # the nodes expand it
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 \
    --export=ALL bash -c 'mkdir -p -m 700 "$0" && [[ -O $0 ]] || { echo "$SLURMD_NODENAME: $0 belongs to another user; set TMPDIR" >&2; exit 1; }' "$node_cache"

# Offline, because compute nodes often have no internet access and training downloads nothing.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}

# Interface between nodes, if the libraries choose the wrong one:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
