//! Bytes between agents and the controller: who may send and have which, and what ends a transfer.

use futures_util::future::join;
use proto::v1::piece::Kind as Part;
use proto::v1::{Failure, Opened, Piece, PullRequest};

use super::*;
use crate::fleet::transfer::fetch;
use crate::jobs::record::NewJob;

/// An agent with a session, and a client for its other calls.
async fn member(bench: &Bench, name: &str) -> (String, Talk, FleetClient<Channel>) {
    let (reply, key) = bench.joined(name).await;
    let mut client = bench.dial(Some((&reply.certificate_pem, &key))).await;
    let mut talk = Talk::open(&mut client, hello(vec![])).await.unwrap();
    assert!(matches!(talk.hear().await.unwrap(), Kind::Welcome(_)));
    while !bench.registry.is_connected(&reply.agent_id) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (reply.agent_id, talk, client)
}

fn opened(id: u64, size: u64) -> Piece {
    Piece { id, kind: Some(Part::Opened(Opened { size, version: "v".into(), offset: 0, sha256: String::new() })) }
}

fn data(bytes: &'static [u8]) -> Piece {
    Piece { id: 0, kind: Some(Part::Data(bytes.into())) }
}

/// The id of the Fetch that comes next.
async fn asked(talk: &mut Talk) -> u64 {
    let Kind::Fetch(fetch) = talk.hear().await.unwrap() else { panic!("no Fetch came") };
    assert_eq!((fetch.path.as_str(), fetch.offset, fetch.length), ("exports/a.raw", 4, 6));
    fetch.id
}

#[actix_web::test]
async fn only_the_agent_that_was_asked_answers_and_once() {
    let bench = Bench::new().await;
    let (a, mut talk, mut client) = member(&bench, "kvm-1").await;
    let (_, _other_talk, mut other) = member(&bench, "kvm-2").await;
    let wanted = fetch(&bench.registry, &a, "exports/a.raw", 4, 6, "");
    let answer = async {
        let id = asked(&mut talk).await;
        let stolen = other.transfer(tokio_stream::iter(vec![opened(id, 10), data(b"forged")])).await;
        assert_eq!(stolen.unwrap_err().code(), Code::PermissionDenied);
        let pieces = vec![opened(id, 10), data(b"abc"), data(b"def")];
        let (mut mine, pieces) = (client.clone(), tokio_stream::iter(pieces));
        (id, tokio::spawn(async move { mine.transfer(pieces).await }))
    };
    let (remote, (id, sent)) = join(wanted, answer).await;
    let mut remote = remote.unwrap();
    let mut got = Vec::new();
    while let Some(bytes) = remote.bytes.recv().await {
        got.extend_from_slice(&bytes.unwrap());
    }
    assert_eq!((got.as_slice(), sent.await.unwrap().unwrap().into_inner().taken), (&b"abcdef"[..], 6));
    let again = client.transfer(tokio_stream::iter(vec![opened(id, 10), data(b"abcdef")])).await;
    assert_eq!(again.unwrap_err().code(), Code::NotFound, "an id is good once");

    // What the agent refuses comes to whoever asked in its own words; too few bytes are an error and no short file.
    let wanted = fetch(&bench.registry, &a, "exports/a.raw", 4, 6, "");
    let answer = async {
        let failed = Failure { code: "not_found".into(), message: "no a.raw here".into(), retryable: false, ..Default::default() };
        let failed = Piece { id: asked(&mut talk).await, kind: Some(Part::Failed(failed)) };
        client.transfer(tokio_stream::iter(vec![failed])).await.unwrap();
    };
    let (refused, ()) = join(wanted, answer).await;
    let refused = refused.err().unwrap();
    assert_eq!((refused.code(), refused.message()), (shared::error::Code::NotFound, "no a.raw here"));
    let wanted = fetch(&bench.registry, &a, "exports/a.raw", 4, 6, "");
    let answer = async {
        let (mut mine, id) = (client.clone(), asked(&mut talk).await);
        // It goes on while the pieces are read.
        (tokio::spawn(async move { mine.transfer(tokio_stream::iter(vec![opened(id, 10), data(b"abc")])).await }),)
    };
    let (remote, (sent,)) = join(wanted, answer).await;
    let mut remote = remote.unwrap();
    assert_eq!(remote.bytes.recv().await.unwrap().unwrap().as_ref(), b"abc");
    assert!(remote.bytes.recv().await.unwrap().unwrap_err().message().contains("ended early"));
    assert_eq!(sent.await.unwrap().unwrap_err().code(), Code::Aborted);

    // Whoever asked leaves: the agent is told, and did not run ahead by more than what lies on the way.
    let wanted = fetch(&bench.registry, &a, "exports/a.raw", 4, 6, "");
    let (pieces, stream) = mpsc::channel(1);
    let answer = async {
        let (mut mine, id) = (client.clone(), asked(&mut talk).await);
        pieces.send(opened(id, 10)).await.unwrap();
        (tokio::spawn(async move { mine.transfer(ReceiverStream::new(stream)).await }),)
    };
    let (remote, (sent,)) = join(wanted, answer).await;
    drop(remote.unwrap());
    assert_eq!(sent.await.unwrap().unwrap_err().code(), Code::Cancelled);
    assert!(fetch(&bench.registry, "agent-none", "exports/a.raw", 4, 6, "").await.is_err());
}

#[actix_web::test]
async fn an_upload_goes_to_the_agent_whose_assignment_names_it() {
    let bench = Bench::new().await;
    std::fs::create_dir_all(bench.uploads.join("up-1")).unwrap();
    let content: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(bench.uploads.join("up-1/disk.raw"), &content).unwrap();
    std::fs::write(bench.uploads.join("up-1/other.raw"), b"other").unwrap();
    let row = crate::store::entities::uploads::Model {
        id: "up-1".into(),
        filename: "disk.raw".into(),
        size: content.len() as i64,
        expected: None,
        sha256: None,
        status: "open".into(),
        created_by: "tester".into(),
        created_at: 0,
        expires_at: 0,
        finished_at: None,
    };
    crate::uploads::store::begin(&bench.store, row, 0, None).await.unwrap().unwrap();
    let (a, mut talk, mut client) = member(&bench, "kvm-1").await;
    let (_, _other_talk, mut other) = member(&bench, "kvm-2").await;
    let job = bench.queue.submit(NewJob { source: "uploads/up-1/disk.raw".into(), ..new_job(&a) }, None).await.unwrap();
    let Kind::Assign(assign) = talk.hear().await.unwrap() else { panic!("no assignment came") };
    assert_eq!(assign.source, "uploads/up-1/disk.raw");
    let request = |path: &str, offset: u64, version: &str| PullRequest {
        job: job.id.clone(),
        epoch: 1,
        path: path.to_owned(),
        offset,
        version: version.to_owned(),
    };
    let good = request("uploads/up-1/disk.raw", 0, "");
    assert_eq!(other.pull(good.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    for bad in [
        request("uploads/up-1/other.raw", 0, ""),
        request("uploads/up-1/../up-1/disk.raw", 0, ""),
        request("/etc/passwd", 0, ""),
        PullRequest { epoch: 2, ..good.clone() },
        PullRequest { job: "job-0000000000000000".into(), ..good.clone() },
        PullRequest { job: "\0".into(), ..good.clone() },
    ] {
        assert_eq!(client.pull(bad.clone()).await.unwrap_err().code(), Code::PermissionDenied, "{bad:?}");
    }
    assert_eq!(client.pull(good).await.unwrap_err().code(), Code::NotFound, "it is not whole yet");
    crate::uploads::store::complete(&bench.store, "up-1", "its digest", 1).await.unwrap();
    let mut version = String::new();
    // Whole, then the rest of it, then whole again because what the agent has is of another version.
    for (offset, of, from) in [(0, "", 0), (1_000_000, "same", 1_000_000), (1_000_000, "another", 0)] {
        let of = if of == "same" { version.clone() } else { of.to_owned() };
        let mut pieces = client.pull(request("uploads/up-1/disk.raw", offset, &of)).await.unwrap().into_inner();
        let Some(Piece { kind: Some(Part::Opened(opened)), .. }) = pieces.message().await.unwrap() else { panic!("no opened") };
        assert_eq!((opened.size, opened.offset, opened.sha256.as_str()), (content.len() as u64, from, "its digest"));
        version = opened.version;
        let mut got = Vec::new();
        while let Some(Piece { kind: Some(Part::Data(bytes)), .. }) = pieces.message().await.unwrap() {
            got.extend_from_slice(&bytes);
        }
        assert!(got == content[from as usize..], "{} bytes from {from}", got.len());
    }
}
