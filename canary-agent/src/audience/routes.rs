//! From routes to classes: which of each service's routes is the first that holds a client.
//!
//! A class is what all services' routes say of a client together. Clients that no route of any
//! service holds are of the class [`Class::REST`]. A class keeps its number for as long as somebody
//! refers to it: the kernel knows clients by it, and old connections by that of before.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use canary_ebpf_common::{
    class::Class,
    networks::{Labelled, Prefix, Width, flatten},
};

/// What a class says: by service, the audience whose route is the first that holds the client.
/// Services without such a route are left out.
pub type Meaning = BTreeMap<String, String>;

/// Why there are no classes for the routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoutesError {
    /// Their overlaps make too many.
    #[error(
        "the routes and audiences overlap in more than {} ways: an agent can tell so many kinds of clients \
         apart; let services share their lists of routes, or audiences not overlap",
        Class::MAX.get()
    )]
    TooMany,
}

/// A service's routes, by the names of their audiences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRoutes {
    /// The service.
    pub service: String,
    /// The audiences, that of the first route first.
    pub audiences: Vec<String>,
}

/// The numbers of classes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    by_meaning: BTreeMap<Meaning, Class>,
}

impl Numbers {
    /// Goes on with the numbers that are in use.
    pub fn adopted(known: impl IntoIterator<Item = (Class, Meaning)>) -> Self {
        let known = known
            .into_iter()
            .filter(|(class, meaning)| *class != Class::REST && !meaning.is_empty());
        Self { by_meaning: known.map(|(class, meaning)| (meaning, class)).collect() }
    }

    /// What each number but that of [`Class::REST`] means.
    pub fn iter(&self) -> impl Iterator<Item = (Class, &Meaning)> {
        self.by_meaning.iter().map(|(meaning, class)| (*class, meaning))
    }

    /// The audience whose route holds clients of `class` in `service`.
    pub fn audience(&self, class: Class, service: &str) -> Option<&str> {
        let (_, meaning) = self.iter().find(|(known, _)| *known == class)?;
        meaning.get(service).map(String::as_str)
    }

    /// Both together; `None` where they contradict each other.
    pub fn with(&self, other: &Self) -> Option<Self> {
        let mut both = self.clone();
        both.by_meaning.extend(other.by_meaning.clone());
        let agrees = |one: &Self| {
            one.by_meaning.iter().all(|(meaning, class)| both.by_meaning[meaning] == *class)
        };
        let distinct: BTreeSet<Class> = both.by_meaning.values().copied().collect();
        (agrees(self) && distinct.len() == both.by_meaning.len()).then_some(both)
    }

    /// Forgets the numbers that are not in `used`: nothing refers to them.
    pub fn retain(&mut self, used: &BTreeSet<Class>) {
        self.by_meaning.retain(|_, class| used.contains(class));
    }

    fn of(&mut self, meaning: Meaning) -> Result<Class, RoutesError> {
        if meaning.is_empty() {
            return Ok(Class::REST);
        }
        if let Some(class) = self.by_meaning.get(&meaning) {
            return Ok(*class);
        }
        let used: BTreeSet<Class> = self.by_meaning.values().copied().collect();
        let mut numbers = (1..=Class::MAX.get()).map(Class::new);
        let free = numbers.find(|class| !used.contains(class)).ok_or(RoutesError::TooMany)?;
        self.by_meaning.insert(meaning, free);
        Ok(free)
    }
}

/// Sets of audiences that some client is in, each once.
struct Sets<'s> {
    /// By number, the audiences' places; number 0 is of none.
    sets: Vec<Vec<u32>>,
    with: HashMap<(u32, u32), u32>,
    by_content: HashMap<Vec<u32>, u32>,
    classes: Vec<Option<Class>>,
    names: &'s [&'s str],
    routes: &'s [ServiceRoutes],
    numbers: &'s mut Numbers,
    error: Option<RoutesError>,
}

impl Sets<'_> {
    fn with(&mut self, set: u32, audience: u32) -> u32 {
        if let Some(known) = self.with.get(&(set, audience)) {
            return *known;
        }
        let mut content = self.sets.get(set as usize).cloned().unwrap_or_default();
        if let Err(at) = content.binary_search(&audience) {
            content.insert(at, audience);
        }
        let next = self.sets.len() as u32;
        let number = *self.by_content.entry(content.clone()).or_insert(next);
        if number == next {
            self.sets.push(content);
            self.classes.push(None);
        }
        self.with.insert((set, audience), number);
        number
    }

    fn class(&mut self, set: u32) -> Class {
        if let Some(Some(class)) = self.classes.get(set as usize) {
            return *class;
        }
        let content = self.sets.get(set as usize).cloned().unwrap_or_default();
        let names: BTreeSet<&str> =
            content.iter().filter_map(|at| self.names.get(*at as usize).copied()).collect();
        let first = |routes: &ServiceRoutes| {
            let audience = routes.audiences.iter().find(|name| names.contains(name.as_str()))?;
            Some((routes.service.clone(), audience.clone()))
        };
        let class = match self.numbers.of(self.routes.iter().filter_map(first).collect()) {
            Ok(class) => class,
            Err(error) => {
                self.error = Some(error);
                Class::REST
            }
        };
        if let Some(known) = self.classes.get_mut(set as usize) {
            *known = Some(class);
        }
        class
    }
}

/// The classes of one family's clients. New ones take free numbers. An audience is what all its
/// `parts` hold together.
///
/// Audiences that no route names, and routes whose audience is not there, hold nobody.
///
/// # Errors
/// There are too many classes; `numbers` is as it was.
pub fn classes<'p>(
    width: Width,
    parts: impl IntoIterator<Item = (&'p str, &'p [Prefix])>,
    routes: &[ServiceRoutes],
    numbers: &mut Numbers,
) -> Result<Labelled<Class>, RoutesError> {
    let routed: BTreeSet<&str> =
        routes.iter().flat_map(|routes| &routes.audiences).map(String::as_str).collect();
    let names: Vec<&str> = routed.into_iter().collect();
    let mut items: Vec<(Prefix, u32)> = Vec::new();
    for (name, prefixes) in parts {
        if let Ok(at) = names.binary_search(&name) {
            items.extend(prefixes.iter().map(|prefix| (*prefix, at as u32)));
        }
    }
    let mut taken = numbers.clone();
    let sets = RefCell::new(Sets {
        sets: vec![Vec::new()],
        with: HashMap::new(),
        by_content: HashMap::from([(Vec::new(), 0)]),
        classes: vec![Some(Class::REST)],
        names: &names,
        routes,
        numbers: &mut taken,
        error: None,
    });
    let classes = flatten(
        width,
        items,
        0,
        |set, audience| sets.borrow_mut().with(set, audience),
        |set| sets.borrow_mut().class(set),
    );
    match sets.into_inner().error {
        Some(error) => Err(error),
        None => {
            *numbers = taken;
            Ok(classes)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::audience::network::{Networks, parse};

    fn parts(
        audiences: &BTreeMap<String, Networks>,
        width: Width,
    ) -> impl Iterator<Item = (&str, &[Prefix])> {
        audiences.iter().map(move |(name, networks)| (name.as_str(), networks.of(width)))
    }

    fn networks(texts: &[&str]) -> Networks {
        Networks::new(texts.iter().map(|text| parse(text).unwrap()))
    }

    fn routes(service: &str, audiences: &[&str]) -> ServiceRoutes {
        let audiences = audiences.iter().map(|name| (*name).to_owned()).collect();
        ServiceRoutes { service: service.to_owned(), audiences }
    }

    #[test]
    fn a_class_is_what_all_services_say_together() {
        let audiences = BTreeMap::from([
            ("staff".to_owned(), networks(&["198.51.100.0/24", "2001:db8::/32"])),
            ("testers".to_owned(), networks(&["198.51.0.0/16"])),
            ("unused".to_owned(), networks(&["0.0.0.0/0"])),
        ]);
        let lists = [routes("blog", &["testers"]), routes("shop", &["staff", "testers", "gone"])];
        let mut numbers = Numbers::default();
        let v4 = classes(Width::V4, parts(&audiences, Width::V4), &lists, &mut numbers).unwrap();
        let v6 = classes(Width::V6, parts(&audiences, Width::V6), &lists, &mut numbers).unwrap();
        let at = |text: &str, service: &str| {
            let addr: IpAddr = text.parse().unwrap();
            let class = if addr.is_ipv4() { v4.at(addr) } else { v6.at(addr) };
            numbers.audience(class, service).map(str::to_owned)
        };
        assert_eq!(at("198.51.100.1", "shop").as_deref(), Some("staff"));
        assert_eq!(at("198.51.100.1", "blog").as_deref(), Some("testers"));
        assert_eq!(at("198.51.1.1", "shop").as_deref(), Some("testers"));
        assert_eq!(at("2001:db8::1", "shop").as_deref(), Some("staff"));
        assert_eq!((at("2001:db8::1", "blog"), at("192.0.2.1", "shop")), (None, None));
        assert_eq!((v4.prefixes().len(), v6.prefixes().len(), numbers.iter().count()), (2, 1, 3));
        // Numbers stay, and are given out again when nobody uses them.
        let before = numbers.clone();
        let again = classes(Width::V4, parts(&audiences, Width::V4), &lists, &mut numbers).unwrap();
        assert_eq!((again, &numbers), (v4.clone(), &before));
        numbers.retain(&v4.prefixes().iter().map(|(_, class)| *class).collect());
        assert_eq!(numbers.iter().count(), 2);
        assert_eq!(Numbers::adopted(before.iter().map(|(class, m)| (class, m.clone()))), before);
        // Two that were given out apart are one, unless a number means two things.
        assert_eq!(before.with(&numbers), Some(before.clone()));
        let other = [routes("blog", &["staff"])];
        classes(Width::V4, parts(&audiences, Width::V4), &other, &mut numbers).unwrap();
        let differs = before.with(&numbers).is_none();
        assert!(differs || before.with(&numbers).is_some_and(|both| both.iter().count() == 4));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn the_class_is_that_of_a_first_match_loop(
            nets in proptest::collection::vec((0_usize..4, any::<u8>(), 24_u8..=32), 0..20),
            lists in proptest::collection::vec(proptest::collection::vec(0_usize..5, 0..4), 1..4),
        ) {
            let name = |at: usize| ["a", "b", "c", "d", "not there"][at].to_owned();
            let mut audiences = BTreeMap::new();
            for (audience, last, len) in &nets {
                let addr = IpAddr::from([192, 0, 2, *last]);
                let net = ipnet::IpNet::new(addr, *len).unwrap().trunc();
                let entry: &mut Networks = audiences.entry(name(*audience)).or_default();
                *entry = std::mem::take(entry).with(Networks::new([net]));
            }
            let lists: Vec<ServiceRoutes> = lists
                .iter()
                .enumerate()
                .map(|(at, list)| ServiceRoutes {
                    service: format!("s{at}"),
                    audiences: list.iter().map(|at| name(*at)).collect(),
                })
                .collect();
            let mut numbers = Numbers::default();
            let found = classes(Width::V4, parts(&audiences, Width::V4), &lists, &mut numbers).unwrap();
            for last in 0..=u8::MAX {
                let addr = IpAddr::from([192, 0, 2, last]);
                for list in &lists {
                    let holds = |name: &&String| {
                        audiences.get(*name).is_some_and(|nets| nets.find(addr).is_some())
                    };
                    let expected = list.audiences.iter().find(holds).map(String::as_str);
                    prop_assert_eq!(numbers.audience(found.at(addr), &list.service), expected);
                }
            }
        }
    }
}
