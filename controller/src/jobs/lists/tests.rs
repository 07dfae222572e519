use std::collections::BTreeSet;

use sea_orm::{DatabaseConnection, EntityTrait};
use shared::job::Status;
use shared::options::{Format, JobType, Options};

use super::memory::Memory;
use super::service::{Asked, page};
use super::store::{self, From, Key, Mark, Provider};
use crate::http::query::{Order, Paging};
use crate::http::reply::Pagination;
use crate::jobs::record::{Job, NewJob};
use crate::jobs::store::{Filter, SortBy};
use crate::jobs::tests::database;
use crate::store::Store;
use crate::store::entities::jobs;

fn job(number: i64, name: &str, status: Status) -> Job {
    let new = NewJob {
        kind: JobType::Export,
        provider: if number % 3 == 0 { "vms".into() } else { "local".into() },
        provider_kind: "local".into(),
        provider_path: "/srv/vms".into(),
        owner: "agent-a".into(),
        vm_id: "web.vmdk".into(),
        vm_name: name.into(),
        source: String::new(),
        capacity: 1 << 30,
        format: Format::Qcow2,
        options: Options::default(),
        created_by: "tester".into(),
        notes: vec![],
    };
    let mut job = Job::new(shared::ids::JobId::generate().to_string(), new);
    // Four share each millisecond.
    job.created_at = 1_000_000 + number / 4;
    job.state.status = status;
    job
}

async fn put(store: &Store, all: &[Job]) {
    let rows: Vec<_> = all.iter().map(Job::to_row).collect();
    let insert = |db: DatabaseConnection| async move {
        for rows in rows.chunks(200) {
            jobs::Entity::insert_many(rows.to_vec()).exec_without_returning(&db).await?;
        }
        Ok(())
    };
    store.run(insert).await.unwrap();
}

async fn ask(store: &Store, memory: &Memory, filter: Filter, by: SortBy, order: Order, offset: u64, limit: u64) -> (Vec<Job>, Pagination) {
    let query = format!("{filter:?} {by:?} {order:?}");
    let asked = Asked { filter, by, order, paging: Paging { offset, limit }, after: None, caller: "c".into(), query };
    page(store, memory, asked).await.unwrap()
}

#[actix_web::test]
async fn search_finds_few_many_short_words_and_nothing_else() {
    let store = database().await;
    let mut all: Vec<Job> = (0..1200).map(|n| job(n, &format!("Web-{n:04}"), Status::Completed)).collect();
    all.push(job(1200, "100% \"Größe\" _x_ AND", Status::Failed));
    put(&store, &all).await;
    let memory = Memory::default();
    let total = async |word: &str| {
        let filter = Filter { search: Some(word.into()), ..Default::default() };
        let (rows, pagination) = ask(&store, &memory, filter, SortBy::Created, Order::Desc, 0, 200).await;
        assert_eq!(rows.len() as u64, pagination.total.min(200), "{word}");
        pagination.total
    };
    for (word, found) in [
        ("wEb-", 1200),
        ("web-00", 100),
        ("WEB-0042", 1),
        // No hex digit, which an id may hold.
        ("we", 1200),
        ("%", 1),
        ("_x_", 1),
        ("___", 0),
        ("größe", 1),
        ("GRÖSSE", 0),
        ("\"größe\"", 1),
        ("and", 1),
        ("web OR size", 0),
        ("nothing", 0),
        (all[3].id.as_str(), 1),
        (&all[3].id[4..12], 1),
    ] {
        assert_eq!(total(word).await, found, "{word}");
    }
    let both = Filter { search: Some("web".into()), status: vec![Status::Failed], ..Default::default() };
    assert_eq!(ask(&store, &memory, both, SortBy::Created, Order::Desc, 0, 10).await.1.total, 0);
    // A job that goes is not found any more.
    let gone = all[7].id.clone();
    store.run(move |db| async move { Ok(jobs::Entity::delete_by_id(gone).exec(&db).await.map(drop)?) }).await.unwrap();
    memory.changed();
    assert_eq!((total("web-0007").await, total("web-").await), (0, 1199));
}

#[actix_web::test]
async fn a_provider_is_a_kind_or_a_name() {
    let store = database().await;
    let mut all: Vec<Job> = (0..30).map(|n| job(n, "web", Status::Queued)).collect();
    all[0].provider_kind = "vsphere".into();
    all[0].provider = "dc1".into();
    all[1].provider_kind = "libvirt".into();
    all[1].provider = "vsphere".into();
    put(&store, &all).await;
    let memory = Memory::default();
    for (word, meaning, found) in [
        ("local", Provider::Kind, 28),
        ("vms", Provider::Name, 9),
        ("dc1", Provider::Name, 1),
        ("vsphere", Provider::Both, 2),
        ("libvirt", Provider::Kind, 1),
        ("none", Provider::Kind, 0),
    ] {
        assert_eq!(Provider::of(store::provider(&store, word).await.unwrap()), meaning, "{word}");
        let filter = Filter { provider: Some(word.into()), ..Default::default() };
        let (rows, pagination) = ask(&store, &memory, filter, SortBy::Created, Order::Desc, 0, 50).await;
        assert_eq!((rows.len() as u64, pagination.total), (found, found), "{word}");
    }
}

/// Pages by counting while jobs are made, and while jobs leave the list: each row that stood all along comes once.
#[actix_web::test]
async fn pages_hold_together_while_rows_come_and_go() {
    let store = database().await;
    let old: Vec<Job> = (0..500).map(|n| job(n, &format!("vm-{}", (n * 7919) % 500), Status::Queued)).collect();
    put(&store, &old).await;
    for (by, order) in [
        (SortBy::Created, Order::Desc),
        (SortBy::Created, Order::Asc),
        (SortBy::VmName, Order::Asc),
        (SortBy::VmName, Order::Desc),
        (SortBy::Priority, Order::Desc),
    ] {
        let memory = Memory::default();
        let filter = Filter { status: vec![Status::Queued], ..Default::default() };
        let (mut seen, mut offset, mut number, mut left) = (Vec::new(), 0, 600, BTreeSet::new());
        loop {
            let (rows, pagination) = ask(&store, &memory, filter.clone(), by, order, offset, 20).await;
            assert_eq!(pagination.offset, offset);
            offset += rows.len() as u64;
            seen.extend(rows.iter().map(|job| job.id.clone()));
            if !pagination.has_more {
                break;
            }
            assert!(pagination.total > offset, "a reader who stops at the total stops too early");
            // New ones at both ends and in the middle; two that were shown leave the list.
            let fresh: Vec<Job> = (0..6).map(|n| job(number + n, ["aaa", "vm-250", "zzz"][n as usize % 3], Status::Queued)).collect();
            number += 6;
            put(&store, &fresh).await;
            for gone in seen.iter().rev().take(2).cloned().collect::<Vec<_>>() {
                left.insert(gone.clone());
                let change = jobs::ActiveModel { status: sea_orm::Set("completed".into()), id: sea_orm::Set(gone), ..Default::default() };
                store.run(move |db| async move { Ok(jobs::Entity::update(change).exec(&db).await.map(drop)?) }).await.unwrap();
            }
            memory.changed();
        }
        let once: BTreeSet<&String> = seen.iter().collect();
        assert_eq!(once.len(), seen.len(), "{by:?} {order:?}: a row was shown twice");
        let stood = old.iter().filter(|job| !left.contains(&job.id)).filter(|job| !once.contains(&job.id));
        assert_eq!(stood.count(), 0, "{by:?} {order:?}: a row that stood all along was skipped");
        // All as it was.
        let back = sea_orm::sea_query::Expr::value("queued");
        let reset = jobs::Entity::update_many().col_expr(jobs::Column::Status, back);
        store.run(move |db| async move { Ok(reset.exec(&db).await.map(drop)?) }).await.unwrap();
        let young =
            sea_orm::QueryFilter::filter(jobs::Entity::delete_many(), sea_orm::ColumnTrait::gte(&jobs::Column::CreatedAt, 1_000_150));
        store.run(move |db| async move { Ok(young.exec(&db).await.map(drop)?) }).await.unwrap();
    }
}

#[actix_web::test]
async fn a_page_goes_on_behind_a_row_and_a_made_up_place_is_refused() {
    let store = database().await;
    put(&store, &(0..30).map(|n| job(n, "web", Status::Queued)).collect::<Vec<_>>()).await;
    let asked = |after: Option<String>, query: &str, by| Asked {
        filter: Filter::default(),
        by,
        order: Order::Desc,
        paging: Paging { offset: 0, limit: 12 },
        after,
        caller: "c".into(),
        query: query.into(),
    };
    let (mut seen, mut after, mut ends) = (BTreeSet::new(), None, Vec::new());
    loop {
        // No memory: another controller answers.
        let (rows, pagination) = page(&store, &Memory::default(), asked(after.take(), "q", SortBy::Created)).await.unwrap();
        seen.extend(rows.into_iter().map(|job| job.id));
        ends.push((pagination.offset, pagination.total, pagination.has_more));
        after = pagination.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!((seen.len(), ends), (30, vec![(0, 30, true), (12, 30, true), (24, 30, false)]));
    let next = page(&store, &Memory::default(), asked(None, "q", SortBy::Created)).await.unwrap().1.next;
    for (after, query, by) in [
        (next.clone(), "other", SortBy::Created),
        (next, "q", SortBy::VmName),
        (Some("x".into()), "q", SortBy::Created),
        (Some("e30".into()), "q", SortBy::Created),
    ] {
        assert!(page(&store, &Memory::default(), asked(after, query, by)).await.is_err(), "{query} {by:?}");
    }
}

#[actix_web::test]
async fn a_total_is_asked_once_and_again_after_a_change() {
    let memory = Memory::default();
    let asked = std::cell::Cell::new(0);
    let ask = || async {
        asked.set(asked.get() + 1);
        Ok::<_, ()>(asked.get())
    };
    assert_eq!(memory.number("k", false, ask()).await, Ok(1));
    assert_eq!(memory.number("k", false, ask()).await, Ok(1));
    memory.changed();
    assert_eq!(memory.number("k", false, ask()).await, Ok(2));
    assert_eq!(memory.number("other", false, ask()).await, Ok(3));
    // A change while the answer is on its way makes it old.
    let late = memory.number("late", false, async {
        memory.changed();
        ask().await
    });
    assert_eq!(late.await, Ok(4));
    assert_eq!(memory.number("late", false, ask()).await, Ok(5));
}

/// Each query that the API can be asked stands on an index here and, in `tests/load.rs`, on Postgres.
#[actix_web::test]
async fn every_list_stands_on_an_index() {
    let store = database().await;
    put(&store, &(0..2000).map(|n| job(n, &format!("web-{n}"), Status::Completed)).collect::<Vec<_>>()).await;
    let mark = Mark { key: Key::Number(1_000_100), id: "job-8".into() };
    let name = Mark { key: Key::Text("web".into()), id: "job-8".into() };
    let status = vec![Status::Completed];
    let provider = |word: &str| Some(word.to_owned());
    for (filter, by, from, index) in [
        (Filter::default(), SortBy::Created, From::Offset(0), "jobs_by_created"),
        (Filter::default(), SortBy::Created, From::Mark(mark.clone()), "jobs_by_created"),
        (Filter::default(), SortBy::Updated, From::Mark(mark.clone()), "jobs_list_updated"),
        (Filter::default(), SortBy::Priority, From::Offset(50), "jobs_list_priority"),
        (Filter::default(), SortBy::VmName, From::Mark(name), "jobs_list_name"),
        (Filter { status: status.clone(), ..Default::default() }, SortBy::Created, From::Mark(mark.clone()), "jobs_list_status "),
        (Filter { status: status.clone(), ..Default::default() }, SortBy::Updated, From::Offset(0), "jobs_list_status_updated"),
        (Filter { provider: provider("local"), ..Default::default() }, SortBy::Created, From::Mark(mark.clone()), "jobs_list_kind "),
        (Filter { provider: provider("vms"), ..Default::default() }, SortBy::Created, From::Offset(0), "jobs_list_provider "),
        (
            Filter { provider: provider("local"), status: status.clone(), ..Default::default() },
            SortBy::Created,
            From::Mark(mark.clone()),
            "jobs_list_kind_status",
        ),
        (Filter { provider: provider("vms"), status, ..Default::default() }, SortBy::Created, From::Offset(0), "jobs_list_provider_status"),
        (Filter { search: provider("web-77"), ..Default::default() }, SortBy::Created, From::Offset(0), "sqlite_autoindex_jobs_1"),
    ] {
        let word = filter.provider.clone().unwrap_or_default();
        let meaning = store::meaning(&store, filter.clone(), Provider::of(store::provider(&store, &word).await.unwrap())).await.unwrap();
        let plan = store::explain(&store, &meaning, (by, sea_orm::Order::Desc), from, 51).await.unwrap();
        assert!(format!("{plan} ").contains(index), "{filter:?} {by:?}:\n{plan}");
        let sorts = plan.contains("USE TEMP B-TREE");
        assert_eq!(sorts, filter.search.is_some(), "{filter:?} {by:?}:\n{plan}");
    }
}
