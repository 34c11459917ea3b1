// Included once by each instruction set's file, after its vector header: defines the table.


#include "kernels/attention.h"
#include "kernels/codes.h"
#include "kernels/grid.h"
#include "kernels/linear.h"
#include "kernels/low_rank.h"
#include "kernels/pages.h"
#include "kernels/rows.h"
#include "kernels/sample.h"
#include "kernels/tender.h"

#define DOVETAIL_TABLE(NAME)                                  \
    namespace dovetail {                                      \
    const Kernels* kernels_##NAME() {                         \
        static Kernels table = {};                            \
        if (!table.name) {                                    \
            add_linear(table), add_rows_of(table);            \
            add_attention(table), add_sample(table);          \
            add_codes(table);                                 \
            add_grid(table), add_tender(table);               \
            add_pages(table), add_low_rank(table);            \
            table.name = #NAME;                               \
        }                                                     \
        return &table;                                        \
    }                                                         \
    }
