# The environment of every rank. train.sbatch and debug.sbatch source it on the first node of a job,
# with the project's folder in $home, and srun hands it on to all ranks. Change it for your cluster.
# shellcheck shell=bash disable=SC2154,SC2034 # $home; container is used by the scripts

# Ranks in a container: the words that come before `python` on each rank. Words that begin with --
# are srun's options (pyxis), others a command. The container's python must have RankZero and the
# container must see $home, the folder of sbatch, the model, the data and output_dir.
#   container=(--container-image=/images/rankzero.sqsh --container-mounts="$home,$PWD,/scratch")
#   container=(apptainer exec --nv --bind "$home,$PWD,/scratch" /images/rankzero.sif)
container=()

# Run a command in the container, or here if there is none.
in_container() {
    if [[ ${container[0]:-} == --* ]]; then
        srun --nodes=1 --ntasks=1 --cpus-per-task=1 --export=ALL "${container[@]}" "$@"
    else
        "${container[@]}" "$@"
    fi
}

# Python: an environment that is active when sbatch is called comes along with it, venv or conda;
# where it has no RankZero, or none is active, the project's own .venv is used. Or activate one here:
#   module load cuda
#   source "$HOME/miniconda3/etc/profile.d/conda.sh" && conda activate rankzero
if [[ ${#container[@]} -eq 0 ]] && ! python -P -c 'import pipeline.errors' 2>/dev/null; then
    PATH=$home/.venv/bin:$PATH
fi
if ! in_container python -P -c 'import pipeline.errors'; then
    if [[ ${#container[@]} -ne 0 ]]; then
        echo "no Python with RankZero in the container (${container[*]}): install it in the image, or bind $home and its environment; see container= in $home/slurm/env.sh" >&2
    else
        echo "no Python with RankZero: activate its environment before sbatch, run \`make install\` in $home, or name it in $home/slurm/env.sh" >&2
    fi
    exit 1
fi
export PYTHONUNBUFFERED=1

# Options that srun would inherit from the job. Every rank must see all GPUs of its node, or they
# cannot access each other's memory; --gpu-bind=none would show GPUs of other jobs too. srun gets
# the CPUs of a task as an option, which must not be given twice.
unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK

# Compiled kernels: on the node's own disk, which is fast and has working locks.
node_cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/rankzero-$UID
export TRITON_CACHE_DIR=$node_cache/triton
export TORCH_EXTENSIONS_DIR=$node_cache/torch_extensions
export TORCHINDUCTOR_CACHE_DIR=$node_cache/inductor
export CUDA_CACHE_PATH=$node_cache/cuda
# The folder must be this user's own: /tmp is everybody's, and the kernels will be executed.
# shellcheck disable=SC2016 # the nodes expand it
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 \
    --export=ALL bash -c 'mkdir -p -m 700 "$0" && [[ -O $0 ]] || { echo "$SLURMD_NODENAME: $0 belongs to another user; set TMPDIR" >&2; exit 1; }' "$node_cache"

# Compute nodes often cannot reach the internet, and training downloads nothing.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}

# The network between nodes: only where the libraries choose the wrong interface.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
