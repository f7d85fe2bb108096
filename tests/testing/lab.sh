#!/usr/bin/env bash
# lab.sh HOSTS COMMAND…: run a command on a login node that is connected to HOSTS hosts. All of them
# are namespaces of this machine; each host has its own network, processes, name and sshd. The lab
# has no external network, and the kernel kills all its processes when this script exits.
#
#   on HOST COMMAND…     run a command on host 0, 1, …
#   cable HOST up|down   connect or disconnect its network
#   power HOST off|on    kill all its processes, or boot it
#
# DEBIAN_HOSTS=1 adds the line `127.0.1.1 nodeN` to /etc/hosts of each host, as Debian does.
set -euo pipefail
if [ "${IN_LAB:-}" != 1 ]; then
  exec env IN_LAB=1 unshare --net --mount --pid --uts --ipc --fork --kill-child=KILL \
    --mount-proc --propagation private bash "$(readlink -f "$0")" "$@"
fi
unset IN_LAB
hosts=$1
shift
export LAB=/run/onecycle-lab
mkdir -p $LAB /run/netns /run/sshd
mount -t tmpfs -o mode=755 none $LAB
mount -t tmpfs none /run/netns
mkdir $LAB/bin
hostname hub
ip link set lo up
ip link add bridge type bridge forward_delay 0
ip addr add 10.99.0.1/24 dev bridge
ip link set bridge up
last=$((hosts - 1))

{
  echo "127.0.0.1 localhost"
  for i in $(seq 0 $last); do echo "10.99.0.1$i node$i"; done
} > $LAB/hosts
mount --bind $LAB/hosts /etc/hosts

ssh-keygen -q -t ed25519 -N '' -f $LAB/key
for i in $(seq 0 $last); do
  ssh-keygen -q -t ed25519 -N '' -f $LAB/host$i
  echo "node$i,10.99.0.1$i $(cut -d' ' -f1,2 $LAB/host$i.pub)" >> $LAB/known_hosts
  printf '%s\n' "ListenAddress 10.99.0.1$i" "HostKey $LAB/host$i" "AuthorizedKeysFile $LAB/key.pub" \
    'PidFile none' 'StrictModes no' 'UsePAM no' 'PasswordAuthentication no' \
    'KbdInteractiveAuthentication no' 'PermitRootLogin prohibit-password' 'UseDNS no' \
    "SetEnv PYTHONPATH=${PYTHONPATH:-}" \
    > $LAB/sshd$i.conf
done
printf '%s\n' 'Host *' "IdentityFile $LAB/key" "UserKnownHostsFile $LAB/known_hosts" \
  'StrictHostKeyChecking yes' 'ServerAliveInterval 3' 'ServerAliveCountMax 3' 'LogLevel ERROR' \
  > $LAB/ssh_config
mount --bind $LAB/ssh_config /etc/ssh/ssh_config

cat > $LAB/boot <<'E2'
i=$1
hostname node$i
mount -t tmpfs -o mode=1777 none /dev/shm
if [ "${DEBIAN_HOSTS:-}" = 1 ]; then
  { echo "127.0.1.1 node$i"; cat $LAB/hosts; } > $LAB/hosts$i
  mount --bind $LAB/hosts$i /etc/hosts
fi
/usr/sbin/sshd -D -e -f $LAB/sshd$i.conf &
[ -x $LAB/also ] && $LAB/also $i &
while :; do wait -n || sleep 0.2; done
E2
cat > $LAB/bin/power <<'E2'
#!/usr/bin/env bash
if [ "$2" = off ]; then kill -KILL $(cat $LAB/node$1.pid); exit; fi
setsid ip netns exec node$1 unshare --uts --pid --mount --ipc --fork --kill-child=KILL \
  --mount-proc --propagation private bash $LAB/boot $1 > $LAB/node$1.log 2>&1 < /dev/null &
for _ in $(seq 250); do
  pid=$(tr -d ' ' < /proc/$!/task/$!/children 2> /dev/null || true)
  [ -n "$pid" ] && break
  sleep 0.02
done
echo $pid > $LAB/node$1.pid
E2
cat > $LAB/bin/on <<'E2'
#!/usr/bin/env bash
i=$1; shift
exec nsenter -t $(cat $LAB/node$i.pid) -n -u -p -m -i --wdns="$PWD" -- "$@"
E2
cat > $LAB/bin/cable <<'E2'
#!/usr/bin/env bash
ip link set wire$1 $2
E2
chmod +x $LAB/bin/*
export PATH=$LAB/bin:$PATH:/usr/sbin

for i in $(seq 0 $last); do
  ip netns add node$i
  ip link add wire$i type veth peer name eth0 netns node$i
  ip link set wire$i master bridge up
  ip -n node$i link set lo up
  ip -n node$i addr add 10.99.0.1$i/24 dev eth0
  ip -n node$i link set eth0 up
  power $i on
done
for i in $(seq 0 $last); do
  for _ in $(seq 100); do (exec 3<> /dev/tcp/10.99.0.1$i/22) 2> /dev/null && break; sleep 0.05; done
done
set +e
"$@"
exit $?
