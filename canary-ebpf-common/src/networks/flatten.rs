//! From overlapping networks to a value for every address.

use super::{
    fewest::Labelled,
    prefix::{Prefix, Width},
};

/// A walk through sorted networks from the outer to the inner ones.
///
/// What stands under an address is what `add` makes of `root` and the items of all networks that
/// the address is in, the widest first; of items of the same network in their order.
fn walk<I: Copy, S: Copy>(
    items: impl IntoIterator<Item = (Prefix, I)>,
    root: S,
    mut add: impl FnMut(S, I) -> S,
    mut found: impl FnMut(Prefix, S),
) {
    let mut stack: Vec<(Prefix, S)> = Vec::new();
    let mut open: Option<(Prefix, S)> = None;
    for (prefix, item) in items {
        let state = match open.take() {
            Some((at, state)) if at == prefix => state,
            other => {
                if let Some((at, state)) = other {
                    found(at, state);
                    stack.push((at, state));
                }
                while stack.last().is_some_and(|(at, _)| !at.contains(prefix)) {
                    stack.pop();
                }
                stack.last().map_or(root, |(_, state)| *state)
            }
        };
        open = Some((prefix, add(state, item)));
    }
    if let Some((at, state)) = open {
        found(at, state);
    }
}

/// A value for every address of `width`: `label` of what `add` makes of `root` and of the items of
/// all networks that the address is in, the widest network first. Addresses in none have the value
/// of `root`, which is also what is not written down.
///
/// ```
/// use std::net::IpAddr;
/// use canary_ebpf_common::networks::{Prefix, Width, flatten};
///
/// // Two routes, of which the first one counts, whatever is inside what.
/// let net = |text: &str, len| Prefix::of(text.parse().unwrap(), len);
/// let items = vec![(net("10.1.0.0", 16), 2_u8), (net("10.0.0.0", 8), 1), (net("192.0.2.0", 24), 2)];
/// let routes = flatten(Width::V4, items, u8::MAX, |first, route| first.min(route), |first| first);
/// let at = |text: &str| routes.at(text.parse::<IpAddr>().unwrap());
/// assert_eq!((at("10.1.2.3"), at("192.0.2.1"), at("172.16.0.1")), (1, 2, u8::MAX));
/// assert_eq!(routes.prefixes().len(), 2);
/// ```
pub fn flatten<I: Copy + Ord, S: Copy, T: Copy + Ord>(
    width: Width,
    mut items: Vec<(Prefix, I)>,
    root: S,
    add: impl FnMut(S, I) -> S,
    mut label: impl FnMut(S) -> T,
) -> Labelled<T> {
    items.sort_unstable();
    items.dedup();
    let rest = label(root);
    let mut found = Vec::with_capacity(items.len());
    walk(items, root, add, |prefix, state| found.push((prefix, label(state))));
    Labelled::fewest(width, rest, &found)
}

/// A value for every address, of the values that it has in two others.
pub fn combine<A: Copy + Ord, B: Copy + Ord, T: Copy + Ord>(
    a: &Labelled<A>,
    b: &Labelled<B>,
    mut label: impl FnMut(A, B) -> T,
) -> Labelled<T> {
    let root = (a.rest(), b.rest());
    let rest = label(root.0, root.1);
    let mut found = Vec::with_capacity(a.prefixes().len() + b.prefixes().len());
    let merged = Merged { a: a.prefixes(), b: b.prefixes() };
    walk(
        merged,
        root,
        |(a, b), item| match item {
            Side::A(value) => (value, b),
            Side::B(value) => (a, value),
        },
        |prefix, (a, b)| found.push((prefix, label(a, b))),
    );
    Labelled::fewest(a.width(), rest, &found)
}

#[derive(Clone, Copy)]
enum Side<A, B> {
    A(A),
    B(B),
}

/// Two sorted lists as one.
struct Merged<'m, A, B> {
    a: &'m [(Prefix, A)],
    b: &'m [(Prefix, B)],
}

impl<A: Copy, B: Copy> Iterator for Merged<'_, A, B> {
    type Item = (Prefix, Side<A, B>);

    fn next(&mut self) -> Option<Self::Item> {
        let of_a = match (self.a.first(), self.b.first()) {
            (Some((a, _)), Some((b, _))) => a <= b,
            (a, _) => a.is_some(),
        };
        if of_a {
            let ((prefix, value), rest) = self.a.split_first()?;
            self.a = rest;
            return Some((*prefix, Side::A(*value)));
        }
        let ((prefix, value), rest) = self.b.split_first()?;
        self.b = rest;
        Some((*prefix, Side::B(*value)))
    }
}

/// The networks that have exactly the addresses of `prefixes` in them, each once: sorted, as few
/// as can be.
pub fn union(mut prefixes: Vec<Prefix>) -> Vec<Prefix> {
    prefixes.sort_unstable();
    let mut out: Vec<Prefix> = Vec::with_capacity(prefixes.len());
    for prefix in prefixes {
        if out.last().is_some_and(|last| last.contains(prefix)) {
            continue;
        }
        let mut whole = prefix;
        // Halves that stand beside each other are one network, and that may be a half, too.
        while let Some(last) = out.last()
            && whole.len() > 0
            && *last == whole.sibling()
        {
            whole = Prefix::new(whole.bits(), whole.len() - 1);
            out.pop();
        }
        out.push(whole);
    }
    out
}
