// Tasks that take their time, leases that exclude each other and end before their time: what a real server does and the simulator does not.
package main

import (
	"flag"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

var (
	firstTaskTime = flag.Duration("task", 0, "how long a snapshot's making and removal take; 0: done when the call is answered")
	laterTaskTime int64    // nanoseconds + 1, where /tasktime has said something
	working       sync.Map // VM id -> its running task
	unlikeMethod  = regexp.MustCompile(`<(?:[A-Za-z0-9]+:)?(memory|removeChildren)>true<`)
	slowMethod    = regexp.MustCompile(`<(?:[A-Za-z0-9]+:)?(CreateSnapshot_Task|RemoveSnapshot_Task)\b`)
)

func taskTime() time.Duration {
	if told := atomic.LoadInt64(&laterTaskTime); told > 0 {
		return time.Duration(told - 1)
	}
	return *firstTaskTime
}

// slowed: whether a call goes to fakeExport's methods below; so does what the simulator does not do as a server does.
func slowed(body []byte) bool {
	return slowMethod.Match(body) && (taskTime() > 0 || unlikeMethod.Match(body) || refusesCalm(body))
}

// holds: whether a snapshot is in a tree.
func holds(tree []types.VirtualMachineSnapshotTree, of types.ManagedObjectReference) bool {
	for _, s := range tree {
		if s.Snapshot == of || holds(s.ChildSnapshotList, of) {
			return true
		}
	}
	return false
}

// above: the snapshot that another was taken over; none for the oldest.
func above(tree []types.VirtualMachineSnapshotTree, of types.ManagedObjectReference) *types.ManagedObjectReference {
	for i := range tree {
		for _, child := range tree[i].ChildSnapshotList {
			if child.Snapshot == of {
				return &tree[i].Snapshot
			}
		}
		if found := above(tree[i].ChildSnapshotList, of); found != nil {
			return found
		}
	}
	return nil
}

// setTaskTime: GET /tasktime?ms=N
func setTaskTime(w http.ResponseWriter, r *http.Request) {
	ms, err := strconv.Atoi(r.URL.Query().Get("ms"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	atomic.StoreInt64(&laterTaskTime, int64(time.Duration(ms)*time.Millisecond)+1)
}

// expire: GET /expire ends every lease as its time-out does.
func expire(w http.ResponseWriter, r *http.Request) {
	n := 0
	leases.Range(func(_, l interface{}) bool { l.(*HttpNfcLease).end(); n++; return true })
	fmt.Fprintf(w, "%d", n)
}

// exporting: whether somebody holds a lease of the VM itself, which a real server gives to one at a time.
func exporting(vm types.ManagedObjectReference) (found bool) {
	leases.Range(func(_, l interface{}) bool {
		found = found || l.(*HttpNfcLease).Info.Entity == vm
		return !found
	})
	return
}

// begin answers a task that runs, and has `work` done by another one after a while. A VM does one thing at a time.
func begin(vm types.ManagedObjectReference, of mo.Reference, name string, work func() types.ManagedObjectReference) (*types.ManagedObjectReference, types.BaseMethodFault) {
	task := simulator.CreateTask(of, name, nil)
	if other, is := working.LoadOrStore(vm.Value, task.Self); is {
		simulator.Map.Remove(task.Self)
		return nil, &types.TaskInProgress{Task: other.(types.ManagedObjectReference)}
	}
	simulator.Map.Update(task, []types.PropertyChange{{Name: "info.state", Val: types.TaskInfoStateRunning}})
	go func() {
		time.Sleep(taskTime())
		done := simulator.Map.Get(work()).(*simulator.Task)
		working.Delete(vm.Value)
		simulator.Map.WithLock(task, func() {
			changes := []types.PropertyChange{{Name: "info.result", Val: done.Info.Result}, {Name: "info.state", Val: done.Info.State}}
			if done.Info.Error != nil {
				changes = append(changes, types.PropertyChange{Name: "info.error", Val: *done.Info.Error})
			}
			simulator.Map.Update(task, changes)
		})
	}()
	return &task.Self, nil
}

func (f *fakeExport) CreateSnapshotTask(ctx *simulator.Context, r *types.CreateSnapshot_Task) soap.HasFault {
	body := new(methods.CreateSnapshot_TaskBody)
	vm, ok := simulator.Map.Get(types.ManagedObjectReference{Type: "VirtualMachine", Value: r.This.Value}).(*simulator.VirtualMachine)
	if !ok {
		body.Fault_ = simulator.Fault("", &types.ManagedObjectNotFound{Obj: r.This})
		return body
	}
	call := *r
	call.This = vm.Self
	task, fault := begin(vm.Self, vm, "createSnapshot", func() (made types.ManagedObjectReference) {
		if call.Quiesce && refusing() {
			return notCalmed(vm)
		}
		simulator.Map.WithLock(vm, func() {
			made = vm.CreateSnapshotTask(&call).(*methods.CreateSnapshot_TaskBody).Res.Returnval
			if n := len(vm.LayoutEx.Snapshot); n > 0 && call.Memory && vm.Runtime.PowerState == types.VirtualMachinePowerStatePoweredOn {
				vm.LayoutEx.Snapshot[n-1].MemoryKey = vm.LayoutEx.Snapshot[n-1].DataKey
			}
		})
		return
	})
	if fault != nil {
		body.Fault_ = simulator.Fault("", fault)
		return body
	}
	body.Res = &types.CreateSnapshot_TaskResponse{Returnval: *task}
	return body
}

func (f *fakeExport) RemoveSnapshotTask(ctx *simulator.Context, r *types.RemoveSnapshot_Task) soap.HasFault {
	body := new(methods.RemoveSnapshot_TaskBody)
	s, ok := simulator.Map.Get(types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: r.This.Value}).(*simulator.VirtualMachineSnapshot)
	if !ok {
		body.Fault_ = simulator.Fault("", &types.ManagedObjectNotFound{Obj: r.This})
		return body
	}
	call := *r
	call.This = s.Self
	task, fault := begin(s.Vm, s, "removeSnapshot", func() types.ManagedObjectReference {
		vm := simulator.Map.Get(s.Vm).(*simulator.VirtualMachine)
		var parent *types.ManagedObjectReference
		if vm.Snapshot != nil {
			parent = above(vm.Snapshot.RootSnapshotList, s.Self)
		}
		done := s.RemoveSnapshotTask(ctx, &call).(*methods.RemoveSnapshot_TaskBody).Res.Returnval
		// With the one that the VM went on from it goes on from the one below.
		simulator.Map.WithLock(vm, func() {
			if vm.Snapshot != nil && vm.Snapshot.CurrentSnapshot != nil && !holds(vm.Snapshot.RootSnapshotList, *vm.Snapshot.CurrentSnapshot) {
				vm.Snapshot.CurrentSnapshot = parent
			}
		})
		return done
	})
	if fault != nil {
		body.Fault_ = simulator.Fault("", fault)
		return body
	}
	body.Res = &types.RemoveSnapshot_TaskResponse{Returnval: *task}
	return body
}
