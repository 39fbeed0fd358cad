//! What is asked and said of audiences.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Api,
    error::ApiError,
    extract::{AudienceName, Body, ClientAddress, NoQuery, Operator},
    openapi::{ChangeErrors, ReadErrors, ServiceErrors},
};

/// `GET /v1/audiences`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Audiences {
    /// In the order of the configuration.
    pub audiences: Vec<AudienceStatus>,
}

/// An audience.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AudienceStatus {
    /// Its name.
    pub name: String,
    /// IPv4 networks, those beside and inside each other counted once.
    pub networks_v4: usize,
    /// IPv4 addresses in them.
    pub addresses_v4: u64,
    /// IPv6 networks.
    pub networks_v6: usize,
    /// IPv6 addresses in them, in decimal: there may be more than a number can hold.
    pub addresses_v6: String,
    /// The file of networks.
    pub file: Option<String>,
    /// The MaxMind DB file.
    pub mmdb: Option<String>,
    /// What its records are asked.
    pub expression: Option<String>,
    /// Members with a lifetime; absent where there can't be any.
    #[serde(default)]
    pub members: Option<AudienceMembers>,
    /// A few of the networks; empty in a list.
    pub examples: Vec<String>,
    /// The routes that name it.
    pub routes: Vec<AudienceRoute>,
}

/// The members of an audience.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AudienceMembers {
    /// How many there are.
    pub members: usize,
    /// How many there may be.
    pub room: usize,
    /// How long one lives that is not renewed, if whoever adds it does not say.
    pub ttl_seconds: u64,
    /// Seconds until the next one's end.
    pub next_ends_in_seconds: Option<f64>,
}

/// `POST /v1/audiences/{name}/members`: all of it is done, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MembersRequest {
    /// Addresses and networks that become members, or are renewed if they are. An IPv6 address
    /// counts as its /64; with `/128` behind it, as itself. With `remove`, 10,000 at most.
    #[serde(default)]
    pub add: Vec<String>,
    /// Those that are members no more.
    #[serde(default)]
    pub remove: Vec<String>,
    /// How long those that are added stay, such as `8h`; without it, as the configuration says.
    /// Nobody's life becomes shorter by this.
    #[serde(default)]
    pub ttl: Option<String>,
    /// Kept in the audit trail.
    #[serde(default)]
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
}

/// What has become, or would become, of members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MembersReport {
    /// Whether it was done.
    pub applied: bool,
    /// The audience.
    pub audience: String,
    /// Members that were none before.
    pub added: usize,
    /// Members whose lives were prolonged.
    pub renewed: usize,
    /// Members whose lives go on for longer than was asked for.
    pub kept: usize,
    /// Members that were taken out.
    pub removed: usize,
    /// Those that were to be taken out and were no members.
    pub not_there: usize,
    /// How long those that were added or renewed stay; absent where nobody was.
    pub ttl_seconds: Option<u64>,
    /// How many members there are then.
    pub members: usize,
    /// How many there may be.
    pub room: usize,
    /// Microseconds until it was in force.
    pub took_us: u64,
}

/// A route of a service for an audience.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AudienceRoute {
    /// The service.
    pub service: String,
    /// Its place among the service's routes, from 1.
    pub place: usize,
    /// The shares that are asked for now, `v2=100%`; empty for control alone.
    pub split: String,
    /// What these shares are set by: the name that stands for the service in commands.
    pub table: String,
}

/// `GET /v1/clients/{address}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClientReport {
    /// The client.
    pub address: String,
    /// The audiences that hold it, in the order of the configuration.
    pub audiences: Vec<HoldingAudience>,
    /// What it is to the services that have routes.
    pub services: Vec<ClientRoute>,
}

/// An audience that holds a client.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HoldingAudience {
    /// Its name.
    pub name: String,
    /// The network that the client is in.
    pub network: String,
    /// A member with a lifetime: seconds until its end.
    #[serde(default)]
    pub ends_in_seconds: Option<f64>,
}

/// What a client is to a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClientRoute {
    /// The service.
    pub service: String,
    /// The first audience of its routes that holds the client, as is in force; absent where the
    /// service's own split counts.
    pub audience: Option<String>,
    /// Whether that has changed within the drain time, so that older connections go by what was.
    pub tracked: bool,
    /// The audience before, while that is remembered.
    pub previous: Option<String>,
}

/// All audiences.
///
/// Not answered over TCP: networks are about people.
#[utoipa::path(get, path = "/v1/audiences", tag = "reading",
    responses((status = 200, description = "The audiences.", body = Audiences), ReadErrors))]
pub(super) async fn list(State(api): State<Api>, _: NoQuery) -> Result<Json<Audiences>, ApiError> {
    Ok(Json(api.handle.audiences().await?))
}

/// One audience, with a few of its networks.
///
/// Not answered over TCP: networks are about people.
#[utoipa::path(get, path = "/v1/audiences/{name}", tag = "reading",
    params(("name" = String, Path, description = "The audience.")),
    responses((status = 200, description = "The audience.", body = AudienceStatus), ServiceErrors))]
pub(super) async fn show(
    State(api): State<Api>,
    AudienceName(name): AudienceName,
    _: NoQuery,
) -> Result<Json<AudienceStatus>, ApiError> {
    Ok(Json(api.handle.audience(name).await?))
}

/// Adds members to an audience, renews them and takes them out; or says what that would do.
///
/// Needs what a change of the split needs.
#[utoipa::path(post, path = "/v1/audiences/{name}/members", tag = "changing",
    params(("name" = String, Path, description = "The audience.")),
    request_body = MembersRequest,
    responses(
        (status = 200, description = "What has become, or would become, of members.",
            body = MembersReport),
        ChangeErrors))]
pub(super) async fn change_members(
    State(api): State<Api>,
    AudienceName(name): AudienceName,
    _: NoQuery,
    Operator(peer): Operator,
    Body(request): Body<MembersRequest>,
) -> Result<Json<MembersReport>, ApiError> {
    Ok(Json(api.handle.members(name, request, peer).await?))
}

/// Which audiences a client is in, and what it is to the services with routes.
///
/// Not answered over TCP: networks are about people.
#[utoipa::path(get, path = "/v1/clients/{address}", tag = "reading",
    params(("address" = String, Path, description = "The client's address.")),
    responses((status = 200, description = "What it is.", body = ClientReport), ReadErrors))]
pub(super) async fn client(
    State(api): State<Api>,
    ClientAddress(address): ClientAddress,
    _: NoQuery,
) -> Result<Json<ClientReport>, ApiError> {
    Ok(Json(api.handle.client(address).await?))
}
