//! A database that takes no more for a while.

use crate::{ask, get, granted, host::Host, machine::Machine, until};
use mlad_allocator::{AllocatorError, LeaseState};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, sqlite::SqliteConnectOptions};
use std::time::Duration;

/// Runs SQL on the database from outside.
pub(crate) async fn sql(machine: &Machine, text: String) {
    let options = SqliteConnectOptions::new().filename(machine.database()).busy_timeout(Duration::from_secs(30));
    let mut connection = options.connect().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn refuse(table: &str) -> String {
    format!("CREATE TRIGGER full BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'disk full'); END;")
}

const ACCEPT: &str = "DROP TRIGGER full;";

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_has_not_happened() {
    let machine = Machine::new("A100-40GB", 1);
    let running = Host::Unix.start(&machine).await;
    let allocator = running.allocator();
    let held = get(allocator, "w-1-1", "1g.5gb").await;

    sql(&machine, refuse("request")).await;
    let error = allocator.request(&ask("w-2-1", "bob", "2g.10gb")).await.unwrap_err();
    assert!(matches!(&error, AllocatorError::Store(text) if text.contains("disk full")), "{error}");
    assert_eq!(allocator.state("w-2-1").await.unwrap_err(), AllocatorError::Unknown("w-2-1".into()));
    assert_eq!(allocator.renew("w-1-1", held.fence).await.unwrap().uuids, held.uuids);
    sql(&machine, ACCEPT.to_owned()).await;
    get(allocator, "w-2-1", "2g.10gb").await;

    sql(&machine, refuse("repartition")).await;
    let slices = machine.slices();
    let error = allocator.request(&ask("w-3-1", "carol", "4g.20gb")).await.unwrap_err();
    assert!(matches!(error, AllocatorError::Store(_)), "{error}");
    assert_eq!(machine.slices(), slices, "no change of a GPU that is not written down");
    sql(&machine, ACCEPT.to_owned()).await;

    sql(&machine, refuse("lease")).await;
    allocator.request(&ask("w-4-1", "dave", "4g.20gb")).await.unwrap();
    let made = until(allocator, async || Some(machine.slices()).filter(|slices| slices.len() == 3)).await;
    assert!(matches!(allocator.state("w-4-1").await.unwrap(), LeaseState::Waiting(_)));
    sql(&machine, ACCEPT.to_owned()).await;
    let lease = granted(allocator, "w-4-1").await;
    assert!(made.iter().any(|(_, uuid)| *uuid == lease.uuids[0]), "made once");
    assert!(lease.fence > held.fence);
    running.stop().await;
}
