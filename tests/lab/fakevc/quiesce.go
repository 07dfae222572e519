// Guests' tools, and what becomes of a snapshot that is to be quiesced: counted, taken without where no tools run (as the API says that the flag
// is ignored then), refused where it was told so.
package main

import (
	"fmt"
	"net/http"
	"regexp"
	"sync/atomic"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

var (
	calmAsked   int64 // snapshots that were to be quiesced
	calmRefused int32 // 1: they fail
	calmFlag    = regexp.MustCompile(`<(?:[A-Za-z0-9]+:)?quiesce>true<`)
)

func refusing() bool { return atomic.LoadInt32(&calmRefused) == 1 }

// refusesCalm: whether a call asks for what is refused now.
func refusesCalm(body []byte) bool { return refusing() && calmFlag.Match(body) }

// calmed counts a snapshot that is to be quiesced, and takes the flag from it where no tools run in the VM.
func calmed(body []byte) []byte {
	if !slowMethod.Match(body) || !calmFlag.Match(body) {
		return body
	}
	atomic.AddInt64(&calmAsked, 1)
	if m := thisID.FindSubmatch(body); m != nil {
		vm, ok := simulator.Map.Get(types.ManagedObjectReference{Type: "VirtualMachine", Value: string(m[1])}).(*simulator.VirtualMachine)
		if ok && (vm.Guest == nil || vm.Guest.ToolsRunningStatus != string(types.VirtualMachineToolsRunningStatusGuestToolsRunning)) {
			return calmFlag.ReplaceAll(body, []byte("<quiesce>false<"))
		}
	}
	return body
}

// notCalmed is a task that has failed as one of ESXi does whose guest did not calm its file systems.
func notCalmed(vm *simulator.VirtualMachine) types.ManagedObjectReference {
	return simulator.CreateTask(vm, "createSnapshot", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		return nil, &types.ApplicationQuiesceFault{}
	}).Run()
}

// setTools: GET /tools?vm=NAME&running=true|false, /tools?refuse=true|false; answers how many snapshots were to be quiesced so far.
func setTools(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if q.Get("refuse") != "" {
		refused := int32(0)
		if q.Get("refuse") == "true" {
			refused = 1
		}
		atomic.StoreInt32(&calmRefused, refused)
	}
	if name := q.Get("vm"); name != "" {
		state := types.VirtualMachineToolsRunningStatusGuestToolsNotRunning
		if q.Get("running") == "true" {
			state = types.VirtualMachineToolsRunningStatusGuestToolsRunning
		}
		vm := vmNamed(name)
		simulator.Map.WithLock(vm, func() {
			simulator.Map.Update(vm, []types.PropertyChange{{Name: "guest.toolsRunningStatus", Val: string(state)}})
		})
	}
	fmt.Fprintf(w, `{"asked": %d}`, atomic.LoadInt64(&calmAsked))
}
