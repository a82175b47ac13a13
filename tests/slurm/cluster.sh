#!/usr/bin/env bash
# A real Slurm of four nodes on this machine, for the tests beside this file: cluster.sh start|stop.
#
# Debian's packages, as root, without systemd or cgroups. Configuration, keys, state and sockets lie
# in a folder of its own, so a Slurm that this machine belongs to is neither used nor touched: clients
# need SLURM_CONF, which `start` prints. `stop` ends exactly the processes that `start` began.
#
# Partitions: low (its jobs give way to `high` at once), grace (after 10 seconds), high.
# Exit code 3: it cannot be had here, and the line says why.
set -euo pipefail

home=${CLUSTER_HOME:-/run/batchvlm-slurm}
conf=$home/slurm.conf
nodes=4
mark='# batchvlm tests'
export SLURM_CONF=$conf

cannot() { echo "cluster.sh: $*" >&2; exit 3; }

install_packages() {
    command -v slurmctld slurmd sbatch munged >/dev/null && return
    [ "$(id -u)" = 0 ] || cannot "Slurm is not installed, and only root could install it"
    command -v apt-get >/dev/null || cannot "Slurm is not installed, and there is no apt-get"
    # The packages would start daemons with a configuration that is not ours: 101 forbids it.
    local policy=/usr/sbin/policy-rc.d is_ours=
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        is_ours=1
    fi
    {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
                slurm-wlm munge
    } >"$home/apt.log" 2>&1 || { tail -5 "$home/apt.log" >&2; is_failed=1; }
    [ -z "$is_ours" ] || rm -f $policy
    [ -z "${is_failed:-}" ] || cannot "apt-get could not install slurm-wlm and munge"
}

configure() {
    local host i
    host=$(hostname -s)
    # A rank finds rank 0 by the name of the first node.
    for i in $(seq $nodes); do
        getent hosts "n$i" >/dev/null || echo "127.0.0.1 n$i $mark" >>/etc/hosts
    done
    getent hosts "$host" >/dev/null || echo "127.0.0.1 $host $mark" >>/etc/hosts
    mkdir -p "$home"/{ctld,slurmd,log,munge}
    [ -s "$home/munge/key" ] || head -c 128 /dev/urandom >"$home/munge/key"
    chown -R munge: "$home/munge"
    chmod 711 "$home/munge"
    chmod 400 "$home/munge/key"
    cat >"$conf" <<END
ClusterName=batchvlm
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again; two minutes by default.
AuthInfo=socket=$home/munge/socket,cred_expire=5
StateSaveLocation=$home/ctld
SlurmdSpoolDir=$home/slurmd/%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# As on some sites: what exits with 75 is requeued for ever.
RequeueExit=75
KillWait=5
KillOnBadExit=0
# As on some sites: a step ends so long after its first task.
WaitTime=2
SlurmdTimeout=10
# A node that was set down stays so: its job starts again elsewhere, not beside its dying self.
ReturnToService=0
MinJobAge=3600
TCPTimeout=2
SlurmdParameters=config_overrides
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[27001-$((27000 + nodes))] CPUs=3 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL DefaultTime=30 PriorityTier=10 PreemptMode=OFF
END
}

begin() { # NAME COMMAND...: remember the daemon by its pid file, which it writes itself
    local name=$1
    shift
    running "$name" || "$@"
}

program() { # NAME: slurmd-n1 -> slurmd, munge/munged -> munged
    local name=${1##*/}
    echo "${name%%-*}"
}

running() { # NAME: is the process of its pid file alive, and the program that it should be?
    local pid
    pid=$(cat "$home/$1.pid" 2>/dev/null) && [ -n "$pid" ] &&
        [[ "$(readlink "/proc/$pid/exe")" == */"$(program "$1")"* ]]
}

start() {
    [ "$(id -u)" = 0 ] || cannot "only root can run slurmd for other users"
    mkdir -p "$home"
    install_packages
    configure
    local i up
    begin munge/munged runuser -u munge -- munged --key-file "$home/munge/key" \
        --socket "$home/munge/socket" --pid-file "$home/munge/munged.pid" \
        --log-file "$home/munge/log" --seed-file "$home/munge/seed"
    begin slurmctld slurmctld -f "$conf"
    for i in $(seq $nodes); do
        mkdir -p "$home/slurmd/n$i"
        begin "slurmd-n$i" slurmd -f "$conf" -N "n$i"
    done
    for _ in $(seq 600); do
        up=$(sinfo -h -N -p low -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated' || true)
        [ "$up" = $nodes ] && echo "$conf" && return
        sleep 0.1
    done
    tail -n 5 "$home"/log/*.log >&2
    echo "cluster.sh: only $up of $nodes nodes came up" >&2
    exit 1
}

finish() { # NAME: SIGTERM, and SIGKILL after 20 seconds
    local pid
    running "$1" || return 0
    pid=$(cat "$home/$1.pid")
    kill "$pid"
    for _ in $(seq 200); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid"
}

stop() {
    local i
    [ -d "$home" ] || return 0
    if running slurmctld; then
        squeue -h -o %A | sort -u | xargs -r scancel 2>/dev/null || true
        for _ in $(seq 150); do
            [ -n "$(squeue -h 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    finish slurmctld
    for i in $(seq $nodes); do finish "slurmd-n$i"; done
    finish munge/munged
    # Not sed -i: in a container the file may be mounted and cannot be replaced.
    grep -vF "$mark" /etc/hosts >"$home/hosts" && cat "$home/hosts" >/etc/hosts
    rm -rf "$home"
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    *) echo "cluster.sh start|stop" >&2; exit 2 ;;
esac
