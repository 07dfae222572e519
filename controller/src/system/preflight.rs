//! Whether one VM is ready to be moved.
//!
//! Owns: the checks of `GET /readiness?provider=&vm_name=`. Never: reads a disk itself; what only the copy can find out is not claimed.
//! A crash here costs one answer.

use proto::v1::browse::Question;
use shared::guest::{Finding, Status};
use shared::vm::Vm;

use super::findings;
use super::readiness::{Check, fail, pass, warn};
use crate::app::App;
use crate::http::reply::Error;
use crate::store::entities::connections;
use crate::{jobs, providers, vms};

/// Formats that an agent reads.
const READ: &[&str] = &["raw", "qcow2", "vmdk", "vhdx", "vhd", "vdi"];

/// All checks of one VM. What cannot be found is a failed check, not an error.
pub async fn checks(app: &App, provider: &str, vm_name: &str) -> Result<Vec<Check>, Error> {
    let connection = match providers::service::resolve(&app.store, provider).await {
        Ok(connection) => connection,
        Err(e) if e.code() == shared::error::Code::BadRequest => {
            return Ok(vec![fail("provider", e.message(), "GET /providers lists what is connected")]);
        }
        Err(e) => return Err(e),
    };
    let mut checks = vec![connected(app, &connection)];
    let found = match vms::service::resolve(&app.store, &connection, vm_name).await {
        Ok(found) => found,
        Err(e) if matches!(e.code(), shared::error::Code::NotFound | shared::error::Code::Ambiguous) => {
            checks.push(fail("vm", e.message(), "GET /vms/list?refresh=true looks again"));
            return Ok(checks);
        }
        Err(e) => return Err(e),
    };
    let (details, inside) = tokio::join!(vms::service::describe(app, &found, true), vms::service::look_inside(app, &found));
    let vm = found.vm;
    if let Err(e) = &details
        && e.code() == shared::error::Code::NotFound
    {
        checks.push(fail("vm", e.message(), "GET /vms/list?refresh=true looks again"));
        return Ok(checks);
    }
    checks.push(readable(&vm, &connection.kind));
    checks.extend(of_vm(&vm, &connection.kind));
    match details {
        Ok(Some(details)) => checks.extend(findings::of(&vm, &details)),
        Ok(None) => checks.push(permissions(app, &connection).await),
        Err(e) => checks.push(fail(
            "permissions",
            format!("unknown, as is what else the VM may have in its way: {}", e.message()),
            "mend the account or the host, or PATCH /providers/{name}; then ask again",
        )),
    }
    checks.push(space(app, &connection, &vm).await);
    match inside {
        Ok(guest) => checks.extend(guest.findings(&vm.firmware).into_iter().map(of_guest)),
        Err(e) => checks.push(warn(
            "guest",
            format!("unknown: {}", e.message()),
            "an export does not need it; before a move to KVM look at it while it is off, or prove the boot",
        )),
    }
    Ok(checks)
}

/// A finding about what lies on the disks.
fn of_guest(finding: Finding) -> Check {
    let Finding { check, status, message, fix } = finding;
    match status {
        Status::Pass => pass(check, message),
        Status::Warn => warn(check, message, fix),
        Status::Fail => fail(check, message, fix),
    }
}

fn connected(app: &App, row: &connections::Model) -> Check {
    let name = &row.name;
    match row.status.as_str() {
        "connected" if app.fleet.is_connected(&row.agent_id) => pass("provider", format!("`{name}` is connected, its agent is here")),
        "error" => fail(
            "provider",
            format!("the inventory of `{name}` cannot be read: {}", row.last_error.clone().unwrap_or_default()),
            "POST /providers/{name}/test says more",
        ),
        _ => fail("provider", format!("the agent of `{name}` is away"), "start it; the job would wait for it"),
    }
}

fn readable(vm: &Vm, kind: &str) -> Check {
    match (vm.problem.as_str(), vm.disks.len()) {
        (problem, _) if kind == "vsphere" && !problem.is_empty() => {
            fail("vm", problem, "see the checks that have failed, and what would mend each; then refresh")
        }
        ("", 0) => fail("vm", format!("`{}` has no disks", vm.name), "attach one, or choose another VM"),
        ("", _) => pass("vm", format!("`{}` with {} disks was read", vm.name, vm.disks.len())),
        (problem, _) => fail("vm", problem, "mend the image (flatten a delta, give it the ending of its format), and refresh"),
    }
}

/// What the inventory says of the VM alone.
fn of_vm(vm: &Vm, kind: &str) -> Vec<Check> {
    let mut checks = Vec::new();
    let unknown: Vec<String> = vm
        .disks
        .iter()
        .filter(|disk| !READ.contains(&disk.format.as_str()))
        .map(|disk| format!("{} is {}", disk.name, disk.format))
        .collect();
    let formats = vm.disks.iter().map(|disk| format!("{} {}", disk.name, disk.format)).collect::<Vec<_>>().join(", ");
    checks.push(match (vm.disks.is_empty(), unknown.is_empty()) {
        (true, _) => fail("disk_types", "there is no disk to be read", "see the check `vm`"),
        (_, true) => pass("disk_types", formats),
        (_, false) => {
            fail("disk_types", format!("{} cannot be read", unknown.join(", ")), format!("convert it to one of: {}", READ.join(", ")))
        }
    });
    checks.push(match vm.firmware.as_str() {
        "bios" | "uefi" => pass("firmware", format!("it boots by {}", vm.firmware)),
        _ => {
            warn("firmware", "nobody says whether it boots by bios or uefi", "find out before it is deployed: the wrong one does not boot")
        }
    });
    // Of a hypervisor's VM the findings say more.
    if kind != "vsphere" {
        checks.push(match vm.snapshots {
            0 => pass("snapshots", "it has none"),
            count => warn(
                "snapshots",
                format!("it has {count}; an export takes the present state"),
                "set include_snapshots to take them along, or consolidate them first",
            ),
        });
        checks.push(match kind {
            "local" => pass("changed_blocks", "an image in a folder is read whole; there is nothing to track"),
            _ => warn("changed_blocks", "changed blocks are not tracked here", "a backup reads the whole disk each time"),
        });
    }
    checks.push(match vm.power_state.as_str() {
        "poweredOff" => pass("power", "it is off"),
        "suspended" => warn("power", "it is suspended: its memory stays behind", "resume it and shut it down"),
        _ if kind == "local" => warn("power", "it runs: what it writes during the export may be torn", "shut it down"),
        _ => warn(
            "power",
            "it runs: it is read as it is at one moment, as after a power failure",
            "set quiesce or power_off where that will not do, or shut it down",
        ),
    });
    if kind != "local" && vm.power_state == "poweredOn" {
        checks.push(if vm.tools_status == "running" {
            pass("quiesce", "its guest can be asked to freeze its file systems while it is read")
        } else {
            warn(
                "quiesce",
                format!("its guest cannot freeze its file systems, as {} not run in it", jobs::state::tools(kind)),
                "install and start that; without quiesce the copy is crash-consistent",
            )
        });
    }
    checks
}

async fn permissions(app: &App, row: &connections::Model) -> Check {
    let connection = providers::service::told(row);
    match app.fleet.ask_within(&row.agent_id, Question::Probe(connection), providers::service::patience(&row.kind)).await {
        Ok(_) => pass("permissions", format!("the agent reads `{}`", row.name)),
        Err(e) => fail(
            "permissions",
            e.message(),
            if row.kind == "local" {
                "let the agent's user read it, and put it inside the agent's roots"
            } else {
                "mend the account or the host, or PATCH /providers/{name}"
            },
        ),
    }
}

async fn space(app: &App, row: &connections::Model, vm: &Vm) -> Check {
    let capacity = vm.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.capacity));
    match app.fleet.ask(&row.agent_id, Question::FreeSpace("exports".to_owned())).await {
        Ok(answer) => room(answer["free_bytes"].as_u64().unwrap_or(0), capacity, vm.disks.iter().all(|disk| disk.thin_provisioned)),
        Err(e) => fail("space", e.message(), "give the agent a writable root `exports`, or name a destination"),
    }
}

/// Whether an export fits. A thin disk seldom takes its whole capacity, so that is a warning only.
fn room(free: u64, capacity: u64, is_thin: bool) -> Check {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let message = format!("{:.1} GiB are free in `exports`; the disks hold {:.1} GiB at most", gib(free), gib(capacity));
    let fix = "make room, export with compress, or name a destination with more";
    match () {
        () if free >= capacity => pass("space", message),
        () if is_thin && free > 0 => warn("space", format!("{message}, less where they are not full"), fix),
        () => fail("space", message, fix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::vm::Disk;

    #[test]
    fn room_is_measured_against_the_capacity() {
        let status = |free, thin| room(free, 100 << 30, thin).status;
        assert_eq!(
            (status(100 << 30, false), status(99 << 30, true), status(99 << 30, false), status(0, true)),
            ("pass", "warn", "fail", "fail")
        );
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let disk = |format: &str| Disk { name: "disk-0".into(), format: format.into(), ..Disk::default() };
        let of = |vm: &Vm, name: &str| of_vm(vm, "local").into_iter().find(|check| check.check == name).map(|check| check.status);
        let vm = Vm { firmware: "uefi".into(), power_state: "poweredOff".into(), disks: vec![disk("qcow2")], ..Vm::default() };
        for name in ["disk_types", "firmware", "snapshots", "changed_blocks", "power"] {
            assert_eq!(of(&vm, name), Some("pass"), "{name}");
        }
        assert_eq!(of(&Vm { disks: vec![disk("parallels")], ..vm.clone() }, "disk_types"), Some("fail"));
        assert_eq!(of(&Vm { disks: Vec::new(), ..vm.clone() }, "disk_types"), Some("fail"));
        assert_eq!(of(&Vm { firmware: String::new(), ..vm.clone() }, "firmware"), Some("warn"));
        assert_eq!(of(&Vm { snapshots: 2, ..vm.clone() }, "snapshots"), Some("warn"));
        let on = Vm { power_state: "poweredOn".into(), ..vm.clone() };
        assert_eq!((of(&on, "power"), of(&on, "quiesce")), (Some("warn"), None));
        let quiesce = |tools: &str| {
            let checks = of_vm(&Vm { tools_status: tools.into(), ..on.clone() }, "libvirt");
            checks.into_iter().find(|check| check.check == "quiesce").map(|check| check.status)
        };
        assert_eq!((quiesce("running"), quiesce("notRunning"), quiesce("unknown")), (Some("pass"), Some("warn"), Some("warn")));
        assert_eq!(readable(&Vm { problem: "damaged".into(), ..vm }, "local").status, "fail");
    }
}
