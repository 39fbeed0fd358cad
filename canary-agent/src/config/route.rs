//! `[[service.route]]`: other splits by audience.
//!
//! Must not know whether an audience is there: that is [`super::across`].

use std::collections::{BTreeMap, HashMap};

use canary_ebpf_common::share::Share;

use super::{
    audience::MAX_NAME_BYTES,
    model::Route,
    scalar,
    sink::Sink,
    source::Span,
    walk::{List, Node},
};

/// Each has a forwarding table of its own.
pub(super) const MAX_ROUTES: usize = 64;

/// A route and where it names its audience.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    /// The route.
    pub route: Route,
    /// Where its audience is named.
    pub audience: Span,
}

/// Reads the routes of a service, whose splits `split` reads.
pub(super) fn read(
    node: &Node<'_>,
    label: &str,
    split: impl Fn(&Node<'_>, &mut Sink) -> BTreeMap<String, Share>,
    sink: &mut Sink,
) -> List<Placed> {
    if node.is_table() {
        sink.error(node.span, "routes are a list, not one table")
            .help("write `[[service.route]]`, with two brackets on each side");
    }
    let mut list = List::default();
    let mut seen: HashMap<String, Span> = HashMap::new();
    for item in node.items() {
        let placed = one(&item, label, &split, sink);
        if let Some(Placed { route, audience }) = &placed {
            if let Some(first) = seen.get(&route.audience) {
                sink.error(
                    *audience,
                    format!("a second route of {label} for `{}` is never reached", route.audience),
                )
                .also(*first, "the first is here");
            } else {
                seen.insert(route.audience.clone(), *audience);
            }
        }
        list.push(placed);
    }
    if list.items.len() > MAX_ROUTES {
        sink.error(
            node.span,
            format!("{label} has {} routes; {MAX_ROUTES} is the most", list.items.len()),
        )
        .help("each has a forwarding table of its own: let one audience have several sources");
    }
    list
}

fn one(
    item: &Node<'_>,
    label: &str,
    split: impl Fn(&Node<'_>, &mut Sink) -> BTreeMap<String, Share>,
    sink: &mut Sink,
) -> Option<Placed> {
    let mut fields = item.table("service.route", sink)?;
    let span = fields.span;
    let audience_node = fields.take("audience", sink);
    let split_node = fields.take("split", sink);
    fields.finish(sink);
    if split_node.is_none() {
        sink.absent(span, format!("this route of {label} has no `split`"))
            .help("write `split = {}` to give its audience control alone");
    }
    let split = split_node.map(|node| split(&node, sink)).unwrap_or_default();
    let Some(node) = audience_node else {
        sink.absent(span, format!("this route of {label} has no `audience`"));
        return None;
    };
    let audience = node.parse(sink, |text| scalar::name(text, "audience", MAX_NAME_BYTES))?;
    Some(Placed { route: Route { audience, split, follows: false }, audience: node.span })
}
