# Source this file inside the lab: it starts a controller on the login node and a daemon on each host,
# with Debian's slurm-wlm 22.05. Settings differ from the defaults for namespaces or for speed.
export SLURM_CONF=$LAB/slurm.conf
mkdir -p $LAB/state $LAB/munge
head -c 1024 /dev/urandom > $LAB/munge/key
chmod 400 $LAB/munge/key
munged --force --key-file=$LAB/munge/key --socket=$LAB/munge/socket --pid-file=$LAB/munge/pid \
  --log-file=$LAB/munge/log --seed-file=$LAB/munge/seed
count=$(ls $LAB/node*.pid | wc -l)
printf '%s\n' 'ClusterName=lab' 'SlurmctldHost=hub(10.99.0.1)' 'SlurmUser=root' \
  "AuthInfo=socket=$LAB/munge/socket,cred_expire=5" "StateSaveLocation=$LAB/state" \
  "SlurmdSpoolDir=$LAB/spool.%n" "SlurmctldPidFile=$LAB/controller.pid" \
  "SlurmdPidFile=$LAB/slurmd.%n.pid" "SlurmctldLogFile=$LAB/controller.log" \
  "SlurmdLogFile=$LAB/slurmd.%n.log" 'ProctrackType=proctrack/linuxproc' 'TaskPlugin=task/none' \
  'JobAcctGatherType=jobacct_gather/none' 'AccountingStorageType=accounting_storage/none' \
  'MpiDefault=none' 'ReturnToService=2' 'SlurmdTimeout=10' 'KillWait=10' 'JobRequeue=1' \
  'SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2' \
  'PreemptType=preempt/partition_prio' 'PreemptMode=REQUEUE' \
  'PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=EXCLUSIVE PriorityTier=1 GraceTime=30' \
  'PartitionName=urgent Nodes=ALL State=UP OverSubscribe=EXCLUSIVE PriorityTier=2 PreemptMode=OFF' \
  > $SLURM_CONF
for i in $(seq 0 $((count - 1))); do
  echo "NodeName=node$i NodeAddr=10.99.0.1$i CPUs=2 RealMemory=1000 State=UNKNOWN" >> $SLURM_CONF
done
printf '%s\n' 'CgroupPlugin=cgroup/v1' 'CgroupAutomount=no' > $LAB/cgroup.conf
slurmctld -c
for i in $(seq 0 $((count - 1))); do
  mkdir -p $LAB/spool.node$i
  on $i slurmd -N node$i
done
for _ in $(seq 150); do [ "$(sinfo -h -t idle -o %D)" = $count ] && break; sleep 0.1; done

# state JOB: print the state of a job.   until_state JOB STATE: wait for a state, at most a minute
state() { scontrol show job $1 -o | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }
until_state() { for _ in $(seq 600); do [ "$(state $1)" = $2 ] && return; sleep 0.1; done; return 1; }
