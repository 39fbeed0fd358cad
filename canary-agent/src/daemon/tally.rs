//! Something of each backend, found by its index: what a status is reckoned from, of ten thousand
//! backends several times each. Indices are given out from the lowest on, so places are few.

use canary_ebpf_common::entry::BackendIndex;

/// Something of each backend.
#[derive(Clone, Debug)]
pub(super) struct ByBackend<T>(Vec<Option<T>>);

impl<T> Default for ByBackend<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> ByBackend<T> {
    /// That of one, if there is one.
    pub(super) fn get(&self, index: BackendIndex) -> Option<&T> {
        self.0.get(usize::from(index.get()))?.as_ref()
    }

    /// All of it, by ascending index.
    pub(super) fn iter(&self) -> impl Iterator<Item = (BackendIndex, &T)> {
        (0_u16..).zip(&self.0).filter_map(|(n, one)| Some((BackendIndex::new(n), one.as_ref()?)))
    }
}

impl<T> FromIterator<(BackendIndex, T)> for ByBackend<T> {
    fn from_iter<I: IntoIterator<Item = (BackendIndex, T)>>(all: I) -> Self {
        let all = all.into_iter();
        let mut places = Vec::with_capacity(all.size_hint().0 + 1);
        for (index, one) in all {
            let place = usize::from(index.get());
            if place >= places.len() {
                places.resize_with(place + 1, || None);
            }
            places[place] = Some(one);
        }
        Self(places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_and_nothing_else() {
        let index = BackendIndex::new;
        let all: ByBackend<&str> = [(index(7), "g"), (index(2), "b")].into_iter().collect();
        assert_eq!((all.get(index(2)), all.get(index(7))), (Some(&"b"), Some(&"g")));
        assert_eq!([0, 3, 8, 0x7fff].map(|n| all.get(index(n))), [None; 4]);
        assert!(all.iter().eq([(index(2), &"b"), (index(7), &"g")]));
        assert_eq!(ByBackend::<u8>::default().get(index(0)), None);
    }
}
