#!/usr/bin/env bash
# A Slurm of two nodes inside namespaces of its own: bash cluster.sh DIR, as cluster.py starts it.
#
# This script is process 1 of the login node: a process namespace with a network of its own, where
# munged and slurmctld run. Each node is another namespace inside, with its own network, host name,
# processes and shared memory, and one slurmd. So 127.0.0.1 and the host name differ from node to
# node, and nothing of the machine is changed: when process 1 is killed, every process, network and
# mount here ends with it. The file DIR/ready appears once slurmctld answers. Disks are shared with
# the machine.
#
# Slurm's long waits are shortened: a requeued job waits 6 s (cred_expire; 121 s by default), a
# silent node counts as lost after 10 s (SlurmdTimeout; 300 s).

set -euo pipefail
dir=$1
network=198.51.100 # reserved for documentation (RFC 5737)

if [[ ${2:-} ]]; then # bash cluster.sh DIR NODE: process 1 of a node
    read -r pid _ </proc/self/stat # the process id in the namespace of the login node
    hostname "$2"
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t tmpfs tmpfs /dev/shm
    ip link set lo up
    echo "$pid" >"$dir/$2.pid.new"
    mv "$dir/$2.pid.new" "$dir/$2.pid"
    until ip -4 addr show dev eth0 2>/dev/null | grep -q inet; do sleep 0.05; done
    slurmd -N "$2" -f "$dir/slurm.conf"
    while :; do sleep 3600 & wait "$!" || true; done # process 1 must live; it reaps orphans
fi

hostname login
mount -t sysfs sysfs /sys
printf '127.0.0.1 localhost\n%s.1 login\n%s.11 node1\n%s.12 node2\n' "$network" "$network" "$network" >"$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts
ip link set lo up
ip link add bridge0 type bridge
ip addr add "$network.1/24" dev bridge0
ip link set bridge0 up

mkdir -p "$dir"/{state,munge,spool/node1,spool/node2,gpus}
head -c 1024 /dev/urandom >"$dir/munge/key"
chmod 400 "$dir/munge/key"
for gpu in {0..7}; do mknod "$dir/gpus/nvidia$gpu" c 1 3; done # allocated to jobs, never opened
echo "Name=gpu File=$dir/gpus/nvidia[0-7] Flags=nvidia_gpu_env" >"$dir/gres.conf"
# Slurm would search for a plugin if none were named; this one is not used.
echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=login($network.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool/%n
SlurmdPidFile=$dir/spool/%n/slurmd.pid
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
KillWait=10
SlurmdTimeout=10
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeAddr=$network.11 CPUs=32 RealMemory=64000 Gres=gpu:8
NodeName=node2 NodeAddr=$network.12 CPUs=32 RealMemory=64000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES DefaultTime=01:00:00 MaxTime=1-0 State=UP
END

# --force: DIR may lie in /tmp, which others may write to.
munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munge/seed" --num-threads=2
slurmctld -f "$dir/slurm.conf"
export SLURM_CONF=$dir/slurm.conf
until scontrol ping | grep -q 'is UP'; do sleep 0.1; done

for node in node1 node2; do
    unshare --net --uts --ipc --mount --pid --fork bash "$0" "$dir" "$node" &
    until [[ -e $dir/$node.pid ]]; do sleep 0.05; done
    ip link add "to-$node" type veth peer name eth0 netns "$(cat "$dir/$node.pid")"
    ip link set "to-$node" master bridge0 up
    on_node=(nsenter --target "$(cat "$dir/$node.pid")" --net)
    "${on_node[@]}" ip link set eth0 up
    "${on_node[@]}" ip addr add "$network.1${node#node}/24" dev eth0
done
until [[ $(sinfo -h -N -o %T) == $'idle\nidle' ]]; do sleep 0.1; done
touch "$dir/ready"
while :; do sleep 3600 & wait "$!" || true; done
