//! The OpenAPI document of the API; committed as `docs/openapi.json`.

use super::server::described;
use mlad::api::ApiError;
use utoipa::{
    OpenApi,
    openapi::{
        Content, PathItem, Ref, RefOr, Response, ResponseBuilder,
        path::Operation,
        security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
    },
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "MLAD",
        description = "Containers with GPU slices, and jobs. Inside a container the API is on the Unix socket \
                       /run/mlad/api.sock, where the connection says who calls; on TCP it takes bearer tokens."
    ),
    components(schemas(ApiError)),
    tags(
        (name = "view", description = "Who calls, what there is, who has it"),
        (name = "jobs", description = "Commands that run to their end without a person"),
        (name = "workspaces", description = "Interactive containers"),
        (name = "account", description = "The caller's own keys and tokens"),
        (name = "projects", description = "Users who share a quota"),
        (name = "reservations", description = "Space on GPUs that is set aside for a time"),
        (name = "admin", description = "For administrators; every change is audited")
    )
)]
struct Document;

/// The document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let (_, routes) = described().split_for_parts();
    let mut document = Document::openapi();
    document.merge(routes);
    document.paths.paths = document
        .paths
        .paths
        .into_iter()
        // A path parameter that may have slashes is axum's own notation.
        .map(|(path, item)| (path.replace("{*", "{"), item))
        .collect();
    for item in document.paths.paths.values_mut() {
        for operation in operations(item) {
            operation.responses.responses.insert("default".into(), RefOr::T(failure()));
        }
    }
    if let Some(components) = document.components.as_mut() {
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
    // On the sockets no token is needed.
    document.security =
        Some(vec![SecurityRequirement::default(), SecurityRequirement::new("token", Vec::<String>::new())]);
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch].into_iter().flatten()
}

fn failure() -> Response {
    ResponseBuilder::new()
        .description("It did not succeed")
        .content("application/json", Content::new(Some(Ref::from_schema_name("ApiError"))))
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_committed_document_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        let now = openapi().to_pretty_json().unwrap() + "\n";
        assert!(committed == now, "write it anew: cargo run -p mlad-gateway -- openapi > docs/openapi.json");
    }

    #[test]
    fn every_operation_has_a_name_of_its_own_and_says_how_it_fails() {
        let mut document = openapi();
        let mut names = BTreeSet::new();
        for (path, item) in &mut document.paths.paths {
            assert!(path.starts_with("/v1/") && !path.contains('*'), "{path}");
            for operation in operations(item) {
                let name = operation.operation_id.clone().unwrap();
                assert!(operation.summary.is_some() && operation.responses.responses.contains_key("default"), "{name}");
                assert!(names.insert(name.clone()), "{name} is there twice");
            }
        }
        assert!(names.len() > 40, "{}", names.len());
    }
}
