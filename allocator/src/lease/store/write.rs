//! What a transition leaves behind.

use super::{PROJECT, USER, signed};
use crate::{
    AccountName, AllocatorError,
    lease::record::{LeaseRow, Purpose, ReservationRow, ReservedSlot, UsedRow, Write},
};
use sqlx::{Sqlite, Transaction};

const END_REQUEST: &str = "UPDATE request SET ended_at = $1, reason = $2 WHERE workload = $3";

/// Writes one thing down.
pub(super) async fn apply(transaction: &mut Transaction<'_, Sqlite>, write: &Write) -> Result<(), AllocatorError> {
    let query = match write {
        Write::Request(row) => sqlx::query(
            "INSERT INTO request (workload, seq, user_name, need, profile, limit_slices, limit_memory_mib,
             expected_seconds, requested_at, slices, nodes, project, priority, preemptible, limit_gpu_seconds,
             on_node, reservation, idle_seconds)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)",
        )
        .bind(&row.workload)
        .bind(signed(row.seq))
        .bind(row.user.as_ref())
        .bind(row.need.to_string())
        .bind(&row.profile)
        .bind(row.limits.slices.map(i64::from))
        .bind(row.limits.gpu_memory_mib.map(signed))
        .bind(row.expected_seconds.map(signed))
        .bind(row.requested_at.as_microsecond())
        .bind(i64::from(row.slices))
        .bind(row.nodes.map(i64::from))
        .bind(row.project.as_deref())
        .bind(i64::from(row.priority))
        .bind(i64::from(row.preemptible))
        .bind(row.limits.gpu_seconds.map(signed))
        .bind(row.on_node.as_deref())
        .bind(row.booked.as_ref().map(|booked| signed(booked.booking.id)))
        .bind(row.idle_seconds.map(signed)),
        Write::GiveUp { workload, at, reason } => {
            sqlx::query(END_REQUEST).bind(at.as_microsecond()).bind(reason).bind(workload)
        }
        Write::Grant(row) => return grant(transaction, row).await,
        Write::Ending { fence, ending } => {
            sqlx::query("UPDATE lease SET ends_at = $1, ends_reason = $2 WHERE fence = $3")
                .bind(ending.as_ref().map(|ending| ending.at.as_microsecond()))
                .bind(ending.as_ref().map(|ending| &ending.reason))
                .bind(signed(*fence))
        }
        Write::Account(account) => {
            let (kind, name) = match &account.name {
                AccountName::User(name) => (USER, name),
                AccountName::Project(name) => (PROJECT, name),
            };
            sqlx::query(
                "INSERT INTO account (kind, name, parent, shares, limit_slices, limit_memory_mib, limit_gpu_seconds)
                 VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (kind, name) DO UPDATE SET
                 parent = excluded.parent, shares = excluded.shares, limit_slices = excluded.limit_slices,
                 limit_memory_mib = excluded.limit_memory_mib, limit_gpu_seconds = excluded.limit_gpu_seconds",
            )
            .bind(kind)
            .bind(name)
            .bind(&account.parent)
            .bind(i64::from(account.shares))
            .bind(account.limits.slices.map(i64::from))
            .bind(account.limits.gpu_memory_mib.map(signed))
            .bind(account.limits.gpu_seconds.map(signed))
        }
        Write::Renew { fence, at, expires_at } => {
            sqlx::query("UPDATE lease SET renewed_at = $1, expires_at = $2, expired_at = NULL WHERE fence = $3")
                .bind(at.as_microsecond())
                .bind(expires_at.as_microsecond())
                .bind(signed(*fence))
        }
        Write::Expire { fence, at } => sqlx::query("UPDATE lease SET expired_at = $1 WHERE fence = $2")
            .bind(at.as_microsecond())
            .bind(signed(*fence)),
        Write::Over { fence, at, reason } => {
            sqlx::query("UPDATE lease SET over_at = $1, over_reason = $2 WHERE fence = $3")
                .bind(at.as_microsecond())
                .bind(reason)
                .bind(signed(*fence))
        }
        Write::Release { fence, workload, at, reason, used: rows } => {
            let lease = sqlx::query("UPDATE lease SET released_at = $1 WHERE fence = $2");
            lease.bind(at.as_microsecond()).bind(signed(*fence)).execute(&mut **transaction).await?;
            let slices = sqlx::query("UPDATE slice SET released_at = $1 WHERE fence = $2");
            slices.bind(at.as_microsecond()).bind(signed(*fence)).execute(&mut **transaction).await?;
            for row in rows {
                used(transaction, row).await?;
            }
            sqlx::query(END_REQUEST).bind(at.as_microsecond()).bind(reason).bind(workload)
        }
        Write::Slice { fence, position, slice } => {
            sqlx::query("UPDATE slice SET uuid = $1, gpu_index = $2 WHERE fence = $3 AND position = $4")
                .bind(&slice.uuid)
                .bind(i64::from(slice.gpu_index))
                .bind(signed(*fence))
                .bind(signed(*position as u64))
        }
        Write::Reserve(row) => return reserve(transaction, row).await,
        Write::Move { id, position, slot, at } => {
            let left = "UPDATE reserved_slice SET left_at = $1
                        WHERE reservation = $2 AND position = $3 AND left_at IS NULL";
            let left = sqlx::query(left).bind(at.as_microsecond()).bind(signed(*id)).bind(signed(*position as u64));
            left.execute(&mut **transaction).await?;
            return reserved_slice(transaction, *id, *position, slot).await;
        }
        Write::Unreserve { id, at } => {
            sqlx::query("UPDATE reservation SET over_at = $1 WHERE id = $2").bind(at.as_microsecond()).bind(signed(*id))
        }
        Write::Begin { repartition, at } => {
            let make = repartition.change.make.map(|(profile, at)| [profile, at.start, at.size]);
            let workload = match &repartition.purpose {
                Purpose::Grant(_, workload) => Some(workload),
                Purpose::Repair(..) => None,
            };
            sqlx::query(
                "INSERT INTO repartition (id, gpu, workload, destroys, makes, begun_at)
                 VALUES ($1, $2, $3, $4, $5, $6)",
            )
            .bind(signed(repartition.change.id))
            .bind(&repartition.gpu)
            .bind(workload)
            .bind(json(&repartition.change.destroy)?)
            .bind(make.as_ref().map(json).transpose()?)
            .bind(at.as_microsecond())
        }
        Write::Node(row) => sqlx::query(
            "INSERT INTO node (name, machine, boot, fence, at, lost) VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT (name) DO UPDATE SET machine = excluded.machine, boot = excluded.boot,
             fence = excluded.fence, at = excluded.at, lost = excluded.lost",
        )
        .bind(&row.name)
        .bind(&row.machine)
        .bind(&row.boot)
        .bind(signed(row.fence))
        .bind(row.at.as_microsecond())
        .bind(i64::from(row.lost)),
        Write::Quarantine(row) => sqlx::query(
            "INSERT INTO quarantine (gpu, node, boot, reason, at) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (gpu) DO UPDATE SET node = excluded.node, boot = excluded.boot, reason = excluded.reason,
             at = excluded.at",
        )
        .bind(&row.gpu)
        .bind(&row.node)
        .bind(&row.boot)
        .bind(&row.reason)
        .bind(row.at.as_microsecond()),
        Write::Trust { gpu } => sqlx::query("DELETE FROM quarantine WHERE gpu = $1").bind(gpu),
        Write::Forget { node } => sqlx::query("DELETE FROM node WHERE name = $1").bind(node),
        Write::Finish { id } => sqlx::query("DELETE FROM repartition WHERE id = $1").bind(signed(*id)),
    };
    query.execute(&mut **transaction).await?;
    Ok(())
}

async fn grant(transaction: &mut Transaction<'_, Sqlite>, row: &LeaseRow) -> Result<(), AllocatorError> {
    sqlx::query(
        "INSERT INTO lease (fence, workload, node, granted, memory_mib, granted_at, renewed_at, expires_at,
         compute_share, memory_share, ends_at, ends_reason) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(signed(row.fence))
    .bind(&row.request.workload)
    .bind(&row.node)
    .bind(&row.profile)
    .bind(signed(row.memory_mib))
    .bind(row.granted_at.as_microsecond())
    .bind(row.renewed_at.as_microsecond())
    .bind(row.expires_at.as_microsecond())
    .bind(i64::from(row.share.compute))
    .bind(i64::from(row.share.memory))
    .bind(row.ending.as_ref().map(|ending| ending.at.as_microsecond()))
    .bind(row.ending.as_ref().map(|ending| &ending.reason))
    .execute(&mut **transaction)
    .await?;
    for (position, slice) in row.slices.iter().enumerate() {
        sqlx::query(
            "INSERT INTO slice (fence, position, node, gpu, gpu_index, profile_id, slice_start, slice_size, whole, uuid)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        )
        .bind(signed(row.fence))
        .bind(signed(position as u64))
        .bind(&slice.node)
        .bind(&slice.gpu)
        .bind(i64::from(slice.gpu_index))
        .bind(i64::from(slice.profile))
        .bind(i64::from(slice.placement.start))
        .bind(i64::from(slice.placement.size))
        .bind(i64::from(slice.whole))
        .bind(&slice.uuid)
        .execute(&mut **transaction)
        .await?;
    }
    Ok(())
}

async fn reserve(transaction: &mut Transaction<'_, Sqlite>, row: &ReservationRow) -> Result<(), AllocatorError> {
    sqlx::query(
        "INSERT INTO reservation (id, name, need, slices, starts_at, ends_at, users, projects, made_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(signed(row.booking.id))
    .bind(row.name.as_ref())
    .bind(row.need.to_string())
    .bind(signed(row.slots.len() as u64))
    .bind(row.booking.from.as_microsecond())
    .bind(row.booking.until.as_microsecond())
    .bind(json(&row.users)?)
    .bind(json(&row.projects)?)
    .bind(row.made_at.as_microsecond())
    .execute(&mut **transaction)
    .await?;
    for (position, slot) in row.slots.iter().enumerate() {
        reserved_slice(transaction, row.booking.id, position, slot).await?;
    }
    Ok(())
}

async fn reserved_slice(
    transaction: &mut Transaction<'_, Sqlite>,
    reservation: u64,
    position: usize,
    slot: &ReservedSlot,
) -> Result<(), AllocatorError> {
    sqlx::query(
        "INSERT INTO reserved_slice (reservation, position, chosen_at, node, gpu, gpu_index, profile_id, slice_start,
         slice_size, whole) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    )
    .bind(signed(reservation))
    .bind(signed(position as u64))
    .bind(slot.chosen_at.as_microsecond())
    .bind(&slot.node)
    .bind(&slot.gpu)
    .bind(i64::from(slot.gpu_index))
    .bind(i64::from(slot.profile))
    .bind(i64::from(slot.placement.start))
    .bind(i64::from(slot.placement.size))
    .bind(i64::from(slot.whole))
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// Adds to what a user has used on a day.
async fn used(transaction: &mut Transaction<'_, Sqlite>, row: &UsedRow) -> Result<(), AllocatorError> {
    sqlx::query(
        "INSERT INTO usage (day, user_name, project, slice_us, compute_us, memory_us, gpu_us, leases)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (day, user_name, project) DO UPDATE SET
         slice_us = usage.slice_us + excluded.slice_us, compute_us = usage.compute_us + excluded.compute_us,
         memory_us = usage.memory_us + excluded.memory_us, gpu_us = usage.gpu_us + excluded.gpu_us,
         leases = usage.leases + excluded.leases",
    )
    .bind(i64::from(row.day))
    .bind(row.user.as_ref())
    .bind(row.project.as_deref().unwrap_or_default())
    .bind(signed(row.slice_us))
    .bind(signed(row.compute_us))
    .bind(signed(row.memory_us))
    .bind(signed(row.gpu_us))
    .bind(signed(row.leases))
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

fn json(value: &impl serde::Serialize) -> Result<String, AllocatorError> {
    serde_json::to_string(value).map_err(|error| AllocatorError::Store(error.to_string()))
}
