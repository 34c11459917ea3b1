// Included once by each file of tile registers, after its vector header and its tile header: defines a table that
// differs from another one in the products through tiles. It is null if they do not do as they should.
#include "kernels/tile_check.h"
#include "kernels/tiles.h"

#define DOVETAIL_TILE_TABLE(NAME)                                        \
    namespace dovetail {                                                 \
    const Kernels* kernels_##NAME(const Kernels& base) {                 \
        static const Kernels table = [&] {                               \
            Kernels k = base;                                            \
            add_tiles(k);                                                \
            k.name = #NAME;                                              \
            return k;                                                    \
        }();                                                             \
        static const bool works = tiles_agree(base, table);              \
        return works ? &table : nullptr;                                 \
    }                                                                    \
    }
