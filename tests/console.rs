//! The console: VNC of a real QEMU through agent and controller, in a WebSocket and by the command.
//!
//! Owns: who may look, that picture and keys go through, how it ends, and what a viewer that does not read costs. Never: what a guest
//! shows. A crash here costs the test.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tokio::net::TcpStream;

use crate::cli::{done, hypersdk};
use crate::harness::client::{Answer, Client};
use crate::harness::fleet::{Fleet, PASSWORD, Plan};
use crate::harness::images::pattern;
use crate::harness::libvirtd::{self, Domain, URI, virsh};
use crate::harness::live::connect;
use crate::harness::process::{Process, mortal};
use crate::harness::rfb::{Viewer, Wire, difference};
use crate::harness::{binary, seconds, wait_for};

const LOOPBACK: &str = "<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1'/>";
/// A text screen's cursor blinks.
const CURSOR: usize = 9 * 16;
const ESCAPE: u32 = 0xff1b;

/// A domain that waits a minute at its firmware's prompt "Press ESC for boot menu".
fn domain(name: &str, graphics: &str) -> Domain {
    let name = format!("{name}-{}", shared::ids::random_hex::<4>());
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64'>hvm</type><bootmenu enable='yes' timeout='60000'/></os>\
         <devices>{graphics}<video><model type='vga'/></video></devices></domain>"
    );
    let file = crate::harness::lab().join(format!("{name}.xml"));
    std::fs::write(&file, xml).unwrap();
    virsh(&["define", file.to_str().unwrap()]);
    std::fs::remove_file(file).unwrap();
    let id = virsh(&["domuuid", &name]).trim().to_owned();
    Domain::adopt(&name, &id)
}

/// Viewers that its QEMU counts.
fn viewers(domain: &Domain) -> usize {
    virsh(&["qemu-monitor-command", &domain.name, "--hmp", "info vnc"]).matches("Client:").count()
}

async fn are_viewing(domain: &Domain, count: usize, limit: Duration) -> u128 {
    let began = Instant::now();
    wait_for(&format!("{count} viewers"), limit, async || {
        let now = viewers(domain);
        if now == count { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
    began.elapsed().as_millis()
}

async fn fleet(name: &str) -> Fleet {
    libvirtd::start();
    let fleet = Fleet::start(name, Plan::plain(), |vms| pattern(&vms.join("image.raw"), 1 << 20, &[(0, 4096)], 1)).await;
    fleet.client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": URI})).await.expect(201);
    fleet
}

async fn start(fleet: &Fleet, domain: &Domain) {
    virsh(&["start", &domain.name]);
    wait_for("it to be listed", seconds(5), async || {
        let answer = fleet.client.get(&format!("/vms/kvm/{}", domain.name)).await;
        if answer.status == 200 { Ok(()) } else { Err(answer.text) }
    })
    .await;
}

fn path(domain: &Domain) -> String {
    format!("/vms/kvm/{}/console", domain.name)
}

/// A WebSocket handshake, for its refusal.
async fn refusal(client: &Client, path: &str, more: &[(&str, &str)]) -> Answer {
    let mut request = client.request(Method::GET, path).header("Connection", "Upgrade").header("Upgrade", "websocket");
    request = request.header("Sec-WebSocket-Version", "13").header("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==");
    for (name, value) in more {
        request = request.header(*name, *value);
    }
    client.send(request).await.unwrap()
}

async fn wire(client: &Client, domain: &Domain) -> Result<Wire, u16> {
    let headers = [
        ("authorization", format!("Bearer {}", client.token.as_ref().unwrap())),
        // As noVNC asks; a server that does not answer it fails the handshake.
        ("sec-websocket-protocol", "binary".to_owned()),
    ];
    let socket = connect(&client.base, &format!("/api/v1{}", path(domain)), &headers).await?;
    Ok(Wire::Web(Box::new(socket)))
}

async fn viewer(client: &Client, domain: &Domain) -> Viewer {
    Viewer::open(wire(client, domain).await.unwrap()).await
}

async fn ticket(client: &Client) -> String {
    client.post("/ws/ticket", json!({})).await.expect(201).body["ticket"].as_str().unwrap().to_owned()
}

/// A picture that stays, but for its cursor.
async fn still(viewer: &mut Viewer) -> Vec<u8> {
    let began = Instant::now();
    loop {
        let first = viewer.picture().await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let second = viewer.picture().await;
        let lit = second.chunks_exact(4).filter(|pixel| pixel.iter().any(|part| *part > 0x40)).count();
        if difference(&first, &second) <= CURSOR && lit > 10 * CURSOR / 9 {
            return second;
        }
        assert!(began.elapsed() < seconds(20), "the picture moves, or is dark ({lit} pixels lit)");
    }
}

/// What an operation's entries in the audit say.
async fn audit(fleet: &Fleet) -> Vec<String> {
    let page = fleet.client.get("/audit?limit=200&search=vm.console").await.expect(200).body;
    page["data"].as_array().unwrap().iter().map(|row| row["outcome"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_console_shows_the_guest_and_takes_its_keys() {
    let fleet = fleet("console").await;
    let screen = domain("screen", LOOPBACK);
    start(&fleet, &screen).await;
    let began = Instant::now();
    let mut looks = viewer(&fleet.client, &screen).await;
    let open = began.elapsed().as_millis();
    assert_eq!(looks.name, format!("QEMU ({})", screen.name));
    assert!(looks.width >= 640 && looks.height >= 400, "{} x {}", looks.width, looks.height);
    assert_eq!(viewers(&screen), 1);

    // The firmware waits for a key; with it comes its menu.
    let before = still(&mut looks).await;
    looks.press(ESCAPE).await;
    let began = Instant::now();
    let changed = wait_for("the boot menu", seconds(10), async || {
        let changed = difference(&before, &looks.picture().await);
        if changed > 4 * CURSOR { Ok(changed) } else { Err(format!("{changed} pixels")) }
    })
    .await;
    println!(
        "open after {open} ms, {} x {}; a key changed {changed} pixels after {} ms",
        looks.width,
        looks.height,
        began.elapsed().as_millis()
    );
    let began = Instant::now();
    let from = looks.received;
    while began.elapsed() < seconds(3) {
        looks.picture().await;
    }
    println!("{:.1} MB/s of whole pictures", (looks.received - from) as f64 / began.elapsed().as_secs_f64() / 1e6);
    drop(looks);
    println!("QEMU has no viewer {} ms after the last left", are_viewing(&screen, 0, seconds(5)).await);
    let said = wait_for("the audit", seconds(5), async || {
        let said = audit(&fleet).await;
        if said.iter().any(|outcome| outcome.contains("bytes shown")) { Ok(said) } else { Err(format!("{said:?}")) }
    })
    .await;
    assert!(said[0].starts_with("ok: ") && said[0].contains("typed") && said[0].contains("the viewer has left"), "{said:?}");

    // On a socket; and a password of the VM's is its viewer's affair.
    let socket = fleet.scratch.join("vnc.sock");
    let apart =
        domain("apart", &format!("<graphics type='vnc' socket='{0}'><listen type='socket' socket='{0}'/></graphics>", socket.display()));
    start(&fleet, &apart).await;
    assert_eq!(viewer(&fleet.client, &apart).await.name, format!("QEMU ({})", apart.name));
    let locked = domain("locked", "<graphics type='vnc' autoport='yes' listen='127.0.0.1' passwd='secret12'/>");
    start(&fleet, &locked).await;
    assert_eq!(Viewer::offered(wire(&fleet.client, &locked).await.unwrap()).await.1, [2], "VNC authentication");

    // As many as there are places; one who leaves makes room.
    let mut many = Vec::new();
    for _ in 0..8 {
        many.push(viewer(&fleet.client, &screen).await);
    }
    let full = refusal(&fleet.client, &path(&screen), &[]).await.refused(503, "unavailable");
    assert!(full.contains('8'), "{full}");
    many.pop();
    are_viewing(&screen, 7, seconds(5)).await;
    wait_for("the free place", seconds(5), async || wire(&fleet.client, &screen).await.map(drop).map_err(|status| status.to_string()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_look_is_told_before_the_upgrade() {
    let fleet = fleet("console-access").await;
    let admin = &fleet.client;
    let screen = domain("seen", LOOPBACK);
    start(&fleet, &screen).await;
    let at = path(&screen);

    // Tickets: once, and only of whoever may.
    let whole = format!("/api/v1{at}");
    let good = ticket(admin).await;
    assert!(connect(&admin.base, &format!("{whole}?ticket={good}"), &[]).await.is_ok());
    assert_eq!(connect(&admin.base, &format!("{whole}?ticket={good}"), &[]).await.err(), Some(401));
    assert!(connect(&admin.base, &format!("{at}?ticket={}", ticket(admin).await), &[]).await.is_ok(), "the legacy path");
    let anonymous = admin.anonymous();
    refusal(&anonymous, &at, &[]).await.refused(401, "unauthorized");
    refusal(&anonymous, &format!("{at}?ticket=nonsense"), &[]).await.refused(401, "unauthorized");
    admin.post("/users", json!({"username": "looker", "password": "quite long enough", "role": "viewer"})).await.expect(201);
    let looker = admin.login("looker", "quite long enough").await;
    refusal(&looker, &at, &[]).await.refused(403, "forbidden");
    let lesser = refusal(&anonymous, &format!("{at}?ticket={}", ticket(&looker).await), &[]).await.refused(403, "forbidden");
    assert!(lesser.contains("operator"), "{lesser}");
    refusal(admin, &at, &[("Origin", "https://elsewhere.example")]).await.refused(403, "forbidden");

    let plain = admin.get(&at).await.refused(400, "bad_request");
    assert!(plain.contains("WebSocket"), "{plain}");
    refusal(admin, &format!("{at}?colour=red"), &[]).await.refused(400, "bad_request");
    refusal(admin, "/vms/kvm/nowhere/console", &[]).await.refused(404, "not_found");
    refusal(admin, "/vms/local/image/console", &[]).await.refused(422, "unprocessable");
    let dark = domain("dark", "");
    start(&fleet, &dark).await;
    let refused = refusal(admin, &path(&dark), &[]).await.refused(422, "unprocessable");
    assert!(refused.contains("graphics type='vnc'"), "{refused}");
    let spice = "<graphics type='spice' autoport='yes' listen='127.0.0.1'/>";
    let off = domain("off", spice);
    wait_for("it to be listed", seconds(5), async || {
        let answer = admin.get(&format!("/vms/kvm/{}", off.name)).await;
        if answer.status == 200 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let refused = refusal(admin, &path(&off), &[]).await.refused(409, "conflict");
    assert!(refused.contains("switch it on"), "{refused}");
    let capable = admin.get("/providers/capabilities").await.expect(200).body;
    let has = |kind: &str| capable["data"].as_array().unwrap().iter().find(|row| row["kind"] == kind).unwrap()["console"].clone();
    assert_eq!((has("libvirt"), has("local"), has("vsphere")), (json!(true), json!(false), json!(false)));
    are_viewing(&screen, 0, seconds(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_console_ends_with_either_side() {
    let mut fleet = fleet("console-ends").await;
    let screen = domain("ends", LOOPBACK);
    start(&fleet, &screen).await;
    let took = async |viewer: &mut Viewer, act: &str, began: Instant| {
        let closed = viewer.closed(seconds(15)).await;
        println!("{act}: closed after {} ms: {} {}", began.elapsed().as_millis(), closed.code, closed.why);
        closed
    };

    // The VM goes.
    let mut looks = viewer(&fleet.client, &screen).await;
    let began = Instant::now();
    virsh(&["destroy", &screen.name]);
    let closed = took(&mut looks, "destroy", began).await;
    assert!(closed.code == 1000 && closed.why.contains("VM") && began.elapsed() < seconds(5), "{closed:?}");
    start(&fleet, &screen).await;

    // Whoever looks may no longer: logged out, and another role.
    let second = fleet.client.login("admin", PASSWORD).await;
    let mut looks = viewer(&second, &screen).await;
    second.post("/auth/logout", json!({})).await.expect(204);
    let closed = took(&mut looks, "logout", Instant::now()).await;
    assert!(closed.code == 1008 && closed.why.contains("token"), "{closed:?}");
    are_viewing(&screen, 0, seconds(5)).await;
    fleet.client.post("/users", json!({"username": "typist", "password": "quite long enough", "role": "operator"})).await.expect(201);
    let typist = fleet.client.login("typist", "quite long enough").await;
    let mut looks = viewer(&typist, &screen).await;
    let change = fleet.client.request(Method::PATCH, "/users/typist").json(&json!({"role": "viewer"}));
    fleet.client.send(change).await.unwrap().expect(200);
    assert_eq!(took(&mut looks, "a smaller role", Instant::now()).await.code, 1008);

    // The connection goes, and comes back.
    let mut looks = viewer(&fleet.client, &screen).await;
    fleet.client.delete("/providers/kvm").await.expect(204);
    let closed = took(&mut looks, "no connection", Instant::now()).await;
    assert!(closed.code == 1008 && closed.why.contains("connection"), "{closed:?}");
    fleet.client.post("/providers/connect", json!({"provider": "libvirt", "name": "kvm", "uri": URI})).await.expect(201);

    // Too much in one frame, and words that are no RFB.
    let mut large = wire(&fleet.client, &screen).await.unwrap();
    large.send(&vec![0; 65 << 10]).await;
    assert_eq!(large.closed(seconds(5)).await.code, 1009);
    let mut spoken = wire(&fleet.client, &screen).await.unwrap();
    spoken.say("hello").await;
    assert_eq!(spoken.closed(seconds(5)).await.code, 1003);

    // The agent goes.
    let mut looks = viewer(&fleet.client, &screen).await;
    fleet.agents[0].kill();
    let began = Instant::now();
    let closed = took(&mut looks, "kill -9 of the agent", began).await;
    assert!(closed.code == 1011 && closed.why.contains("agent-0") && began.elapsed() < seconds(5), "{closed:?}");
    are_viewing(&screen, 0, seconds(5)).await;
    fleet.agents[0].start();

    // The controller goes: by kill, then in order.
    let looks =
        wait_for("the agent's return", seconds(30), async || wire(&fleet.client, &screen).await.map_err(|status| status.to_string())).await;
    are_viewing(&screen, 1, seconds(5)).await;
    fleet.controller.kill();
    println!("kill -9 of the controller: QEMU has no viewer after {} ms", are_viewing(&screen, 0, seconds(10)).await);
    drop(looks);
    fleet.controller.start();
    crate::harness::fleet::ready(&mut fleet.controller, &fleet.client).await;
    let looks =
        wait_for("the agent's return", seconds(60), async || wire(&fleet.client, &screen).await.map_err(|status| status.to_string())).await;
    let mut looks = Viewer::open(looks).await;
    let began = Instant::now();
    fleet.controller.process().signal("TERM");
    let closed = took(&mut looks, "a drain", began).await;
    assert_eq!(closed.code, 1001, "{closed:?}");
    fleet.controller.process().wait(seconds(20)).await;
    println!("the drain took {} ms", began.elapsed().as_millis());
}

/// A viewer that asks and never reads: the console stops, nothing grows, and after a minute it is put out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_not_read_costs_no_memory_and_is_put_out() {
    let mut fleet = fleet("console-slow").await;
    let screen = domain("slow", LOOPBACK);
    start(&fleet, &screen).await;
    // One that reads shows what there would be, and warms the processes.
    let mut reads = viewer(&fleet.client, &screen).await;
    let began = Instant::now();
    while began.elapsed() < seconds(5) {
        reads.picture().await;
    }
    let could = reads.received;
    drop(reads);
    let peaks = [fleet.controller.process().peak_mib(), fleet.agents[0].process().peak_mib()];
    let mut slow = Vec::new();
    for _ in 0..4 {
        slow.push(viewer(&fleet.client, &screen).await);
    }
    let began = Instant::now();
    while began.elapsed() < seconds(20) {
        for viewer in &mut slow {
            viewer.ask().await;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let after = [fleet.controller.process().peak_mib(), fleet.agents[0].process().peak_mib()];
    println!("4 viewers that read nothing: controller {} → {} MiB, agent {} → {} MiB", peaks[0], after[0], peaks[1], after[1]);
    // Queues and windows of four consoles: 4 × (1 MiB to the viewer + 2 MiB from the agent).
    for (peak, after) in peaks.iter().zip(after) {
        assert!(after <= peak + 24, "{peak} → {after} MiB");
    }
    println!("all are put out {} ms later", are_viewing(&screen, 0, seconds(90)).await);
    let said = wait_for("the audit", seconds(10), async || {
        let said: Vec<String> = audit(&fleet).await.into_iter().filter(|outcome| outcome.contains("took nothing")).collect();
        if said.len() == 4 { Ok(said) } else { Err(format!("{said:?}")) }
    })
    .await;
    for outcome in said {
        let shown: usize = outcome.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(shown < 4 << 20 && shown < could / 2, "{outcome}; one that reads took {could} in 5 s");
        println!("{outcome}; one that reads took {could} bytes in 5 s");
    }
    for viewer in &mut slow {
        let closed = viewer.closed(seconds(5)).await;
        assert!(closed.code == 1008 && closed.why.contains("took nothing"), "{closed:?}");
    }
    drop(slow);

    // The other way: a QEMU that takes nothing. It stays stopped until its end.
    let mut types = viewer(&fleet.client, &screen).await;
    let pid = std::fs::read_to_string(format!("/run/libvirt/qemu/{}.pid", screen.name)).unwrap();
    crate::harness::process::run(std::process::Command::new("kill").args(["-STOP", pid.trim()]));
    let sent = types.type_until_full(512 << 20).await;
    let after = [fleet.controller.process().peak_mib(), fleet.agents[0].process().peak_mib()];
    println!("a QEMU that is stopped took {} KiB of keys; controller {} MiB, agent {} MiB", sent >> 10, after[0], after[1]);
    assert!(sent < 64 << 20 && after[0] <= peaks[0] + 32 && after[1] <= peaks[1] + 32, "{sent}, {peaks:?} → {after:?}");
    // Nothing is read of a viewer meanwhile, so that it may leave unseen for a minute.
    drop(types);
    wait_for("the audit", seconds(70), async || {
        let said = audit(&fleet).await;
        if said.len() == 6 && said.iter().all(|outcome| outcome.starts_with("ok: ")) { Ok(()) } else { Err(format!("{said:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_lets_one_viewer_after_the_other_through() {
    let fleet = fleet("console-cli").await;
    let screen = domain("command", LOOPBACK);
    start(&fleet, &screen).await;
    let home = fleet.scratch.dir("cli");
    let login = ["login", &fleet.endpoints.rest, "--fingerprint", &fleet.endpoints.fingerprint];
    done(hypersdk(&home, &login, &[("HYPERSDK_PASSWORD", PASSWORD)]));
    for (address, code) in [("0.0.0.0:0", 2), ("nonsense", 2)] {
        let (ended, _, said) = hypersdk(&home, &["console", &screen.name, "--listen", address], &[]);
        assert!(ended == code && said.contains("127.0.0.1") || said.contains("loopback"), "{address}: {ended} {said}");
    }
    let (ended, _, said) = hypersdk(&home, &["console", "image", "--provider", "local"], &[]);
    assert!(ended == 1 && said.contains("disk images"), "{ended} {said}");

    let mut command = mortal(&binary("hypersdk"));
    command.args(["console", &screen.name]).env("HYPERSDK_HOME", &home);
    let mut command = Process::start("console", command, &home.join("console.log"));
    let address = wait_for("the command to listen", seconds(15), async || {
        let said = command.log();
        let found = said.split(" at ").nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
        found.filter(|address| address.starts_with("127.0.0.1:")).ok_or(said)
    })
    .await;
    let said = command.log();
    assert!(said.contains(&format!("VNC for {} at {address} (Ctrl-C ends it)", screen.name)), "{said}");
    for round in 0..2 {
        let mut looks = Viewer::open(Wire::Tcp(TcpStream::connect(&address).await.unwrap())).await;
        assert_eq!(looks.name, format!("QEMU ({})", screen.name));
        if round == 0 {
            let before = still(&mut looks).await;
            looks.press(ESCAPE).await;
            wait_for("the boot menu", seconds(10), async || {
                let changed = difference(&before, &looks.picture().await);
                if changed > 4 * CURSOR { Ok(()) } else { Err(format!("{changed} pixels")) }
            })
            .await;
        }
        drop(looks);
        are_viewing(&screen, 0, seconds(5)).await;
    }
    let mut looks = Viewer::open(Wire::Tcp(TcpStream::connect(&address).await.unwrap())).await;
    virsh(&["destroy", &screen.name]);
    looks.closed(seconds(5)).await;
    wait_for("its word", seconds(5), async || {
        let said = command.log();
        if said.contains("the VM closed its screen") { Ok(()) } else { Err(said) }
    })
    .await;
    // It goes on, and says why the next one finds nothing.
    let mut none = Wire::Tcp(TcpStream::connect(&address).await.unwrap());
    none.next().await.unwrap_err();
    wait_for("its word", seconds(5), async || {
        let said = command.log();
        if said.contains("switch it on") { Ok(()) } else { Err(said) }
    })
    .await;
    assert!(command.ended().is_none(), "{}", command.log());
    command.signal("INT");
    assert_eq!(command.wait(seconds(5)).await.code(), Some(0), "{}", command.log());
    let (ended, _, said) = hypersdk(&home, &["console", &screen.name], &[]);
    assert!(ended == 1 && said.contains("switch it on"), "{ended} {said}");
}
