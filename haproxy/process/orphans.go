package process

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"
)

// EndOrphans ends every HAProxy that runs this configuration file, as it would hold the ports
// and serve an outdated state. It returns how many processes it found.
func EndOrphans(file string, log *slog.Logger) int {
	found := map[int]bool{}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		deadline := time.Now().Add(2 * time.Second)
		for {
			pids := running(file)
			if len(pids) == 0 {
				return len(found)
			}
			for _, pid := range pids {
				if !found[pid] || sig == syscall.SIGKILL {
					found[pid] = true
					if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
						log.Warn("cannot end an old HAProxy", "pid", pid, "error", err)
					}
				}
			}
			if time.Now().After(deadline) {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return len(found)
}

// running lists the processes that have this configuration file in their command line and see
// the same file at its path. In another mount namespace, such as a container's, the path is
// another file and the process belongs to another sidecar.
func running(file string) []int {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, d := range dirs {
		pid := 0
		if _, err := fmt.Sscan(d.Name(), &pid); err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		args, err := os.ReadFile("/proc/" + d.Name() + "/cmdline")
		if err != nil || len(args) == 0 {
			continue
		}
		part := bytes.Split(args, []byte{0})
		for i := 1; i < len(part); i++ {
			if string(part[i]) == file && string(part[i-1]) == "-f" && !bytes.Contains(args, []byte("\x00-c\x00")) {
				if sameFiles(d.Name()) {
					out = append(out, pid)
				}
				break
			}
		}
	}
	return out
}

// sameFiles reports whether a process sees the files that we see. The mount namespace of
// a worker of another account may be hidden from us; then its control group tells, which
// everybody may read and which is another one in another container.
func sameFiles(pid string) bool {
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return true // a kernel without namespaces
	}
	if theirs, err := os.Readlink("/proc/" + pid + "/ns/mnt"); err == nil {
		return theirs == ours
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return true
	}
	other, err := os.ReadFile("/proc/" + pid + "/cgroup")
	return err == nil && bytes.Equal(own, other)
}
