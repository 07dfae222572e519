//! Files that people send in chunks: any order, side by side, again, across a kill of the controller; and what is wrong is named.
//!
//! Owns: `/upload/*`. Never: looks into the store. A crash here costs the test.

use futures_util::future::join_all;
use rand::RngExt as _;
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::harness::client::{Answer, Client};
use crate::harness::fleet::{Database, Fleet, Plan};
use crate::harness::{random, seconds, wait_for};

const CHUNK: usize = 10_000_000;

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

async fn send(client: &Client, id: &str, index: usize, bytes: &[u8], digest: Option<&str>) -> Result<Answer, String> {
    let request = client.request(Method::POST, &format!("/upload/chunk?upload_id={id}&index={index}"));
    let request = request.header("Content-Type", "application/octet-stream").body(bytes.to_vec());
    client
        .send(match digest {
            Some(digest) => request.header("X-Chunk-SHA256", digest),
            None => request,
        })
        .await
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap_or_else(|| panic!("no list: {value}")).iter().map(|number| number.as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_come_in_any_order_and_outlive_a_kill_on_sqlite() {
    chunks_come_in_any_order_and_outlive_a_kill(Database::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_come_in_any_order_and_outlive_a_kill_on_postgres() {
    chunks_come_in_any_order_and_outlive_a_kill(Database::Postgres).await;
}

async fn chunks_come_in_any_order_and_outlive_a_kill(database: Database) {
    let mut rng = random("uploads");
    let mut fleet = Fleet::start("uploads", Plan { database, agents: 0, ..Plan::plain() }, |_| {}).await;
    let client = fleet.client.clone();
    let mut content = vec![0u8; 25_000_000];
    rng.fill(&mut content[..]);
    // No guest's sector may look like an image of another format.
    content[..4096].fill(0);
    let digest = sha256(&content);
    let chunks: Vec<&[u8]> = content.chunks(CHUNK).collect();

    let body = json!({"filename": "web server.raw", "size": content.len(), "sha256": digest});
    let init = || client.send(client.request(Method::POST, "/upload/init").header("Idempotency-Key", "one").json(&body));
    let begun = init().await.unwrap().expect(201);
    assert_eq!((&begun.body["chunk_size"], &begun.body["chunks"]), (&json!(CHUNK), &json!(3)), "{}", begun.text);
    assert!(begun.body["expires_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(init().await.unwrap().expect(201).body, begun.body, "the same key gives the first answer again");
    let id = begun.body["upload_id"].as_str().unwrap().to_owned();
    let status = async |client: &Client| client.get(&format!("/upload/status/{id}")).await.expect(200).body;

    // What is wrong is named, and costs nothing.
    for bad in ["", "..", "a/b", "../x", ".x", "a\\b", "a\nb"] {
        client.post("/upload/init", json!({"filename": bad, "size": 1})).await.refused(400, "bad_request");
    }
    for bad in [json!(0), json!(-1), json!(1u64 << 60), json!("1")] {
        client.post("/upload/init", json!({"filename": "x", "size": bad})).await.refused(400, "bad_request");
    }
    client.post("/upload/init", json!({"filename": "x", "size": 1, "sha256": "abc"})).await.refused(400, "bad_request");
    let sentence = send(&client, &id, 3, chunks[0], None).await.unwrap().refused(400, "bad_request");
    assert!(sentence.contains("0 to 2"), "{sentence}");
    let sentence = send(&client, &id, 2, &chunks[2][1..], None).await.unwrap().refused(400, "bad_request");
    assert!(sentence.contains("5000000"), "{sentence}");
    send(&client, &id, 0, &content[..CHUNK + 1], None).await.unwrap().refused(413, "too_large");
    send(&client, &id, 0, chunks[0], Some(&digest)).await.unwrap().refused(422, "verification_failed");
    send(&client, &id, 0, chunks[0], Some("abc")).await.unwrap().refused(400, "bad_request");
    send(&client, "upload-00", 0, chunks[0], None).await.unwrap().refused(404, "not_found");
    let text = client.request(Method::POST, &format!("/upload/chunk?upload_id={id}&index=0")).header("Content-Type", "text/plain");
    client.send(text.body("x")).await.unwrap().refused(415, "unsupported_media_type");
    client.post("/upload/chunk", json!({})).await.refused(400, "bad_request");
    assert_eq!(numbers(&status(&client).await["missing"]), [0, 1, 2]);

    // A kill in the middle of two chunks: whatever was answered before is there.
    send(&client, &id, 2, chunks[2], Some(&sha256(chunks[2]))).await.unwrap().expect(200);
    let sending = [1, 0].map(|index| {
        let (client, id, bytes) = (client.clone(), id.clone(), chunks[index].to_vec());
        tokio::spawn(async move { (index, send(&client, &id, index, &bytes, Some(&sha256(&bytes))).await) })
    });
    tokio::time::sleep(std::time::Duration::from_millis(rng.random_range(20..400))).await;
    fleet.restart_controller().await;
    let mut kept = vec![2];
    for answer in join_all(sending).await.into_iter().map(Result::unwrap) {
        if let (index, Ok(answer)) = answer {
            kept.push(index as u64);
            answer.expect(200);
        }
    }
    let now = status(&client).await;
    let received = numbers(&now["received"]);
    println!("answered before the kill: {kept:?}, on the disk: {received:?}");
    assert!(kept.iter().all(|index| received.contains(index)), "{kept:?} {now:#}");

    // One that is damaged on its way, without a digest of its own: the whole digest finds it, and it can be sent again.
    let mut damaged = chunks[1].to_vec();
    damaged[4_999_999] ^= 1;
    for index in [2, 0] {
        send(&client, &id, index, chunks[index], Some(&sha256(chunks[index]))).await.unwrap().expect(200);
    }
    if !received.contains(&1) {
        let missing = client.post("/upload/complete", json!({"upload_id": id})).await;
        let sentence = missing.refused(409, "conflict");
        assert!(sentence.contains('1') && missing.body["detail"]["missing"] == json!([1]), "{}", missing.text);
    }
    send(&client, &id, 1, &damaged, None).await.unwrap().expect(200);
    let sentence = client.post("/upload/complete", json!({"upload_id": id})).await.refused(422, "verification_failed");
    assert!(sentence.contains(&digest), "{sentence}");
    assert_eq!(status(&client).await["status"], "open");
    send(&client, &id, 1, chunks[1], None).await.unwrap().expect(200);
    let now = status(&client).await;
    assert_eq!(
        (&now["received_bytes"], &now["size"], &now["missing"]),
        (&json!(content.len()), &json!(content.len()), &json!([])),
        "{now:#}"
    );
    fleet.restart_controller().await;
    let done = client.post("/upload/complete", json!({"upload_id": id})).await.expect(200);
    assert_eq!((&done.body["size"], &done.body["sha256"]), (&json!(content.len()), &json!(digest)));
    let path = done.body["path"].as_str().unwrap().to_owned();
    assert_eq!(path, format!("uploads/{id}/web server.raw"));
    assert_eq!(client.post("/upload/complete", json!({"upload_id": id})).await.expect(200).body, done.body, "again");
    send(&client, &id, 0, chunks[0], None).await.unwrap().refused(409, "conflict");
    let absolute = done.body["absolute_path"].as_str().unwrap();
    assert!(std::fs::read(absolute).unwrap() == content, "the file on the disk is what was sent");
    let page = client.get(&format!("/browse/files?path=uploads/{id}")).await.expect(200).body;
    assert_eq!((&page["data"][0]["format"], &page["data"][0]["size"]), (&json!("raw"), &json!(content.len())), "{page:#}");
    for given in [path.replace(' ', "%20"), absolute.replace(' ', "+")] {
        let bytes = client.request(Method::GET, &format!("/download?path={given}")).send().await.unwrap().bytes().await.unwrap();
        assert!(bytes == content, "{given}: {} bytes came back", bytes.len());
    }
    client.delete(&format!("/upload/{id}")).await.expect(204);
    client.get(&format!("/upload/status/{id}")).await.refused(404, "not_found");
    assert!(!std::path::Path::new(absolute).exists());

    // The quota counts what is promised, and gives back what is deleted or forgotten.
    fleet.controller.set("UPLOADS_QUOTA_BYTES", "30000000");
    fleet.controller.set("UPLOADS_EXPIRY_HOURS", "0.0008");
    fleet.restart_controller().await;
    let sentence = client.post("/upload/init", json!({"filename": "a", "size": 30_000_001})).await.refused(413, "too_large");
    assert!(sentence.contains("30000000"), "{sentence}");
    let first = client.post("/upload/init", json!({"filename": "a", "size": 20_000_000})).await.expect(201);
    client.post("/upload/init", json!({"filename": "b", "size": 20_000_000})).await.refused(413, "too_large");
    let id = first.body["upload_id"].as_str().unwrap();
    wait_for("the upload that nobody sends to go", seconds(15), async || {
        let answer = client.get(&format!("/upload/status/{id}")).await;
        if answer.status == 404 { Ok(()) } else { Err(answer.text) }
    })
    .await;
    client.post("/upload/init", json!({"filename": "b", "size": 20_000_000})).await.expect(201);
    // Many at once have no more together: 20 MB are taken, 10 MB are left. Slow, so that each has looked before another is done.
    if let Some(db) = &fleet.db {
        let pause = "BEGIN PERFORM pg_sleep(0.1); RETURN NEW; END";
        db.sql(&format!("CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS '{pause}'"));
        db.sql("CREATE TRIGGER pause BEFORE INSERT ON uploads FOR EACH ROW EXECUTE FUNCTION pause()");
    }
    let begun =
        join_all((0..16).map(|_| async { client.post("/upload/init", json!({"filename": "c", "size": 4_000_000})).await.status })).await;
    assert_eq!((begun.iter().filter(|status| **status == 201).count(), begun.iter().filter(|status| **status == 413).count()), (2, 14));
}
