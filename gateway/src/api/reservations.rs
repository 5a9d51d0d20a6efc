//! Reservations: `/v1/reservations` for those who may use them, `/v1/admin/reservations` for administrators. Who may
//! not use one does not learn that it exists, but for the time at which space that is free is not theirs.

use super::{
    Rooms,
    caller::{Account, Admin, Body, Named},
    failure::{Answer, Failure},
};
use axum::{Json, extract::State, http::StatusCode};
use mlad::api::{NewReservation, Reservation, ReservationList};
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(list_reservations))
        .routes(routes!(list_all_reservations, add_reservation))
        .routes(routes!(remove_reservation))
}

/// The reservations that the caller may use: their own, and those of projects that they are a member of.
#[utoipa::path(get, path = "/v1/reservations", tag = "reservations", responses((status = 200, body = ReservationList)))]
async fn list_reservations(State(state): State<Rooms>, me: Account) -> Answer<Json<ReservationList>> {
    let mut reservations = Vec::new();
    for mut reservation in state.allocator.reservations().await? {
        let mut mine = Vec::new();
        for project in &reservation.projects {
            if state.store.is_member(me.user.id, project).await? {
                mine.push(project.clone());
            }
        }
        reservation.users.retain(|name| *name == me.user.name);
        reservation.projects = mine;
        if !reservation.users.is_empty() || !reservation.projects.is_empty() {
            reservations.push(reservation);
        }
    }
    Ok(Json(ReservationList { reservations }))
}

/// Every reservation that is not over.
#[utoipa::path(get, path = "/v1/admin/reservations", tag = "admin", responses((status = 200, body = ReservationList)))]
async fn list_all_reservations(State(state): State<Rooms>, _: Admin) -> Answer<Json<ReservationList>> {
    Ok(Json(ReservationList { reservations: state.allocator.reservations().await? }))
}

/// Sets space on GPUs aside for users and projects. Refused if leases that last into that time, or other
/// reservations, are in the way.
#[utoipa::path(post, path = "/v1/admin/reservations", tag = "admin", request_body = NewReservation, responses((status = 201, body = Reservation)))]
async fn add_reservation(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Body(new): Body<NewReservation>,
) -> Answer<(StatusCode, Json<Reservation>)> {
    // A name that is mistyped would keep the space for nobody.
    for user in &new.users {
        state.store.user_by_name(user).await?;
    }
    for project in &new.projects {
        state.store.project(project).await?;
    }
    let from = new.from.map_or_else(|| "now".to_owned(), |from| from.to_string());
    let people: Vec<&str> = new.users.iter().chain(&new.projects).map(String::as_str).collect();
    let detail = format!("{} times {} from {from} to {} for {}", new.slices, new.need, new.until, people.join(", "));
    state.store.audit(&by.user, "reservation.add", &new.name, Some(&detail)).await?;
    let made = state.allocator.reserve(&new).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// Removes a reservation. What runs in it goes on until its end; jobs that wait for it are held.
#[utoipa::path(delete, path = "/v1/admin/reservations/{name}", tag = "admin", params(("name" = String, Path)), responses((status = 204)))]
async fn remove_reservation(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Named(name): Named<String>,
) -> Answer<StatusCode> {
    if !state.allocator.reservations().await?.iter().any(|reservation| reservation.name == name) {
        return Err(Failure::not_found("reservation", &name));
    }
    state.store.audit(&by.user, "reservation.remove", &name, None).await?;
    state.allocator.cancel_reservation(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
