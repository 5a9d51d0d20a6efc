//! What the allocator starts from: all that is in force.

use super::{Loaded, Store, USED_DAYS, USER, moment, narrow, unsigned};
use crate::{
    Account, AccountName, AllocatorError, Limits,
    geometry::Share,
    lease::record::{
        Booked, Ending, LeaseRow, NodeRow, Purpose, QuarantineRow, Repartition, RequestRow, ReservationRow,
        ReservedSlot, SliceRow, Status, UsedRow,
    },
    lease::usage::day_of,
    node::Change,
    queue::Booking,
};
use jiff::Timestamp;
use mlad::api::Placement;
use sqlx::{Row, sqlite::SqliteRow};

impl Store {
    /// All that is in force at a time, and what was used before it.
    pub(in crate::lease) async fn load(&self, now: Timestamp) -> Result<Loaded, AllocatorError> {
        let mut loaded = Loaded::default();
        let open = "SELECT request.*, starts_at, ends_at AS reserved_until, name AS reservation_name FROM request
                    LEFT JOIN reservation ON reservation.id = request.reservation WHERE ended_at IS NULL
                    AND workload NOT IN (SELECT workload FROM lease) ORDER BY seq";
        for row in sqlx::query(open).fetch_all(&self.pool).await? {
            loaded.waiting.push(RequestRow { booked: booked(&row)?, ..request(&row)? });
        }
        let held = "SELECT lease.*, request.*, starts_at, reservation.ends_at AS reserved_until,
                    name AS reservation_name FROM lease JOIN request USING (workload)
                    LEFT JOIN reservation ON reservation.id = request.reservation
                    WHERE released_at IS NULL ORDER BY fence";
        for row in sqlx::query(held).fetch_all(&self.pool).await? {
            let mut lease = lease(&row)?;
            lease.request.booked = booked(&row)?;
            loaded.leases.push(lease);
        }
        let slices = "SELECT * FROM slice WHERE released_at IS NULL ORDER BY fence, position";
        for row in sqlx::query(slices).fetch_all(&self.pool).await? {
            let fence = unsigned(row.try_get("fence")?);
            if let Ok(at) = loaded.leases.binary_search_by_key(&fence, |lease| lease.fence)
                && let Some(lease) = loaded.leases.get_mut(at)
            {
                lease.slices.push(slice(&row)?);
            }
        }
        loaded.reservations = self.reservations().await?;
        for row in sqlx::query("SELECT * FROM repartition ORDER BY id").fetch_all(&self.pool).await? {
            loaded.repartitions.push(repartition(&row)?);
        }
        let asked = "SELECT profile FROM request WHERE profile <> 'cpu' ORDER BY seq DESC LIMIT 2048";
        loaded.asked = sqlx::query_scalar(asked).fetch_all(&self.pool).await?;
        loaded.asked.reverse();
        let used = "SELECT * FROM usage WHERE day > $1";
        for row in sqlx::query(used).bind(i64::from(day_of(now) - USED_DAYS)).fetch_all(&self.pool).await? {
            loaded.used.push(used_row(&row)?);
        }
        for row in sqlx::query("SELECT * FROM account").fetch_all(&self.pool).await? {
            loaded.accounts.push(account(&row)?);
        }
        for row in sqlx::query("SELECT * FROM quarantine").fetch_all(&self.pool).await? {
            loaded.quarantine.push(quarantine(&row)?);
        }
        for row in sqlx::query("SELECT * FROM node ORDER BY name").fetch_all(&self.pool).await? {
            loaded.nodes.push(node(&row)?);
        }
        for row in sqlx::query("SELECT name, value FROM counter").fetch_all(&self.pool).await? {
            let value = unsigned(row.try_get("value")?);
            match row.try_get::<String, _>("name")?.as_str() {
                "fence" => loaded.fence = value,
                "seq" => loaded.seq = value,
                "repartition" => loaded.repartition = value,
                _ => {}
            }
        }
        Ok(loaded)
    }

    /// Every reservation that is not over, with where it is.
    async fn reservations(&self) -> Result<Vec<ReservationRow>, AllocatorError> {
        let mut found = Vec::new();
        let open = "SELECT * FROM reservation WHERE over_at IS NULL ORDER BY id";
        for row in sqlx::query(open).fetch_all(&self.pool).await? {
            found.push(reservation(&row)?);
        }
        let slices = "SELECT * FROM reserved_slice WHERE left_at IS NULL
                      AND reservation IN (SELECT id FROM reservation WHERE over_at IS NULL)
                      ORDER BY reservation, position";
        for row in sqlx::query(slices).fetch_all(&self.pool).await? {
            let id = unsigned(row.try_get("reservation")?);
            if let Ok(at) = found.binary_search_by_key(&id, |reservation| reservation.booking.id)
                && let Some(reservation) = found.get_mut(at)
            {
                reservation.slots.push(reserved_slot(&row)?);
            }
        }
        Ok(found)
    }
}

pub(super) fn account(row: &SqliteRow) -> Result<Account, AllocatorError> {
    let name: String = row.try_get("name")?;
    let is_user = row.try_get::<String, _>("kind")? == USER;
    Ok(Account {
        name: if is_user { AccountName::User(name) } else { AccountName::Project(name) },
        parent: row.try_get("parent")?,
        shares: narrow(row.try_get("shares")?),
        limits: limits(row)?,
    })
}

pub(super) fn limits(row: &SqliteRow) -> Result<Limits, AllocatorError> {
    Ok(Limits {
        slices: row.try_get::<Option<i64>, _>("limit_slices")?.map(narrow),
        gpu_memory_mib: row.try_get::<Option<i64>, _>("limit_memory_mib")?.map(unsigned),
        gpu_seconds: row.try_get::<Option<i64>, _>("limit_gpu_seconds")?.map(unsigned),
    })
}

fn request(row: &SqliteRow) -> Result<RequestRow, AllocatorError> {
    let need: String = row.try_get("need")?;
    Ok(RequestRow {
        workload: row.try_get("workload")?,
        seq: unsigned(row.try_get("seq")?),
        user: row.try_get::<String, _>("user_name")?.into(),
        need: need.parse().map_err(|error: mlad::api::NeedError| AllocatorError::Store(error.to_string()))?,
        slices: narrow(row.try_get("slices")?),
        nodes: row.try_get::<Option<i64>, _>("nodes")?.map(narrow),
        project: row.try_get::<Option<String>, _>("project")?.map(Into::into),
        idle_seconds: row.try_get::<Option<i64>, _>("idle_seconds")?.map(unsigned),
        on_node: row.try_get::<Option<String>, _>("on_node")?.map(Into::into),
        priority: i32::try_from(row.try_get::<i64, _>("priority")?).unwrap_or(0),
        preemptible: row.try_get::<i64, _>("preemptible")? != 0,
        profile: row.try_get("profile")?,
        limits: limits(row)?,
        expected_seconds: row.try_get::<Option<i64>, _>("expected_seconds")?.map(unsigned),
        requested_at: time(row, "requested_at")?,
        // Of what is in force alone.
        booked: None,
    })
}

fn booked(row: &SqliteRow) -> Result<Option<Booked>, AllocatorError> {
    let id: Option<i64> = row.try_get("reservation")?;
    // One that is long over may be forgotten.
    let name: Option<String> = row.try_get("reservation_name")?;
    let (Some(id), Some(name)) = (id, name) else { return Ok(None) };
    let booking = Booking { id: unsigned(id), from: time(row, "starts_at")?, until: time(row, "reserved_until")? };
    Ok(Some(Booked { booking, name: name.into() }))
}

fn reservation(row: &SqliteRow) -> Result<ReservationRow, AllocatorError> {
    let broken = |error: serde_json::Error| AllocatorError::Store(error.to_string());
    let names = |text: String| serde_json::from_str(&text).map_err(broken);
    let need: String = row.try_get("need")?;
    Ok(ReservationRow {
        booking: Booking {
            id: unsigned(row.try_get("id")?),
            from: time(row, "starts_at")?,
            until: time(row, "ends_at")?,
        },
        name: row.try_get::<String, _>("name")?.into(),
        need: need.parse().map_err(|error: mlad::api::NeedError| AllocatorError::Store(error.to_string()))?,
        users: names(row.try_get("users")?)?,
        projects: names(row.try_get("projects")?)?,
        made_at: time(row, "made_at")?,
        // Read from their own table.
        slots: Vec::new(),
    })
}

fn reserved_slot(row: &SqliteRow) -> Result<ReservedSlot, AllocatorError> {
    let number = |column| row.try_get::<i64, _>(column).map(narrow);
    Ok(ReservedSlot {
        node: row.try_get("node")?,
        gpu: row.try_get("gpu")?,
        gpu_index: number("gpu_index")?,
        profile: number("profile_id")?,
        placement: Placement { start: number("slice_start")?, size: number("slice_size")? },
        whole: number("whole")? != 0,
        chosen_at: time(row, "chosen_at")?,
    })
}

pub(super) fn lease(row: &SqliteRow) -> Result<LeaseRow, AllocatorError> {
    let over: Option<String> = row.try_get("over_reason")?;
    let expired: Option<i64> = row.try_get("expired_at")?;
    let ends_at: Option<i64> = row.try_get("ends_at")?;
    let reason = row.try_get::<Option<String>, _>("ends_reason")?.unwrap_or_default();
    Ok(LeaseRow {
        fence: unsigned(row.try_get("fence")?),
        request: request(row)?,
        node: row.try_get("node")?,
        profile: row.try_get("granted")?,
        memory_mib: unsigned(row.try_get("memory_mib")?),
        share: Share { compute: narrow(row.try_get("compute_share")?), memory: narrow(row.try_get("memory_share")?) },
        // Read from their own table.
        slices: Vec::new(),
        granted_at: time(row, "granted_at")?,
        renewed_at: time(row, "renewed_at")?,
        expires_at: time(row, "expires_at")?,
        status: match (over, expired) {
            (Some(reason), _) => Status::Over(reason),
            (None, Some(_)) => Status::Expired,
            (None, None) => Status::Active,
        },
        ending: ends_at.map(|at| Ok::<_, AllocatorError>(Ending { at: moment(at)?, reason })).transpose()?,
    })
}

pub(super) fn slice(row: &SqliteRow) -> Result<SliceRow, AllocatorError> {
    let number = |column| row.try_get::<i64, _>(column).map(narrow);
    Ok(SliceRow {
        node: row.try_get("node")?,
        gpu: row.try_get("gpu")?,
        gpu_index: number("gpu_index")?,
        profile: number("profile_id")?,
        placement: Placement { start: number("slice_start")?, size: number("slice_size")? },
        whole: number("whole")? != 0,
        uuid: row.try_get("uuid")?,
    })
}

/// A row of the table `usage`.
pub(super) fn used_row(row: &SqliteRow) -> Result<UsedRow, AllocatorError> {
    let number = |column| row.try_get::<i64, _>(column).map(unsigned);
    let project: String = row.try_get("project")?;
    Ok(UsedRow {
        day: i32::try_from(row.try_get::<i64, _>("day")?).unwrap_or(i32::MAX),
        user: row.try_get::<String, _>("user_name")?.into(),
        project: Some(project).filter(|project| !project.is_empty()).map(Into::into),
        slice_us: number("slice_us")?,
        compute_us: number("compute_us")?,
        memory_us: number("memory_us")?,
        gpu_us: number("gpu_us")?,
        leases: number("leases")?,
    })
}

fn quarantine(row: &SqliteRow) -> Result<QuarantineRow, AllocatorError> {
    Ok(QuarantineRow {
        gpu: row.try_get("gpu")?,
        node: row.try_get("node")?,
        boot: row.try_get("boot")?,
        reason: row.try_get("reason")?,
        at: time(row, "at")?,
    })
}

fn node(row: &SqliteRow) -> Result<NodeRow, AllocatorError> {
    Ok(NodeRow {
        name: row.try_get("name")?,
        machine: row.try_get("machine")?,
        boot: row.try_get("boot")?,
        fence: unsigned(row.try_get("fence")?),
        at: time(row, "at")?,
        lost: row.try_get::<i64, _>("lost")? != 0,
    })
}

fn repartition(row: &SqliteRow) -> Result<Repartition, AllocatorError> {
    let broken = |error: serde_json::Error| AllocatorError::Store(error.to_string());
    let make: Option<String> = row.try_get("makes")?;
    let make: Option<[u32; 3]> = make.as_deref().map(serde_json::from_str).transpose().map_err(broken)?;
    let destroy = serde_json::from_str(&row.try_get::<String, _>("destroys")?).map_err(broken)?;
    let workload: Option<String> = row.try_get("workload")?;
    let make = make.map(|[profile, start, size]| (profile, Placement { start, size }));
    Ok(Repartition {
        gpu: row.try_get("gpu")?,
        change: Change { id: unsigned(row.try_get("id")?), destroy, make },
        purpose: workload.map_or(Purpose::Repair(0, 0), |workload| Purpose::Grant(0, workload)),
    })
}

fn time(row: &SqliteRow, column: &str) -> Result<Timestamp, AllocatorError> {
    moment(row.try_get(column)?)
}
